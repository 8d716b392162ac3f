"""The set-up steps that need a Google account of the daemon's owner: `login` in Chrome, `googledrive` for its files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import anyio
from pydantic import BaseModel, Field, ValidationError

from ...errors import GuestMisbehaved, MissingRequirement, TaskInvalid
from ...guest import Browser
from ..task import Parameters
from .chrome import LOAD_SECONDS, PAUSE, answering, evaluate, loaded, new_tab, visit
from .context import Context, Run
from .drive import API, Drive, several

DRIVE_PAGE = "https://drive.google.com/drive/my-drive"
FIELD_SECONDS = 15.0
"""How long Google's pages may take to come to the next question."""

EMAIL, PASSWORD = 'input[type="email"]', 'input[type="password"]'
AFTER_EMAIL, AFTER_PASSWORD = "#identifierNext button", "#passwordNext button"

SHOWN = "!!document.querySelector({0}) && document.querySelector({0}).checkVisibility()"
FOCUS = "document.querySelector({0}).focus()"
CLICK = "document.querySelector({0}).click()"


class Account(BaseModel):
    email: str = Field(min_length=3)
    password: str = Field(min_length=1, repr=False)


async def login(context: Context, parameters: Parameters, *, page: str = DRIVE_PAGE) -> str:
    """Log in to `platform` (googledrive) as ENVD_GOOGLE_ACCOUNT, in a new tab. The task's own `settings_file` names a
    file of the host that it was written on, and is not used.

    Ends when Google has sent the browser on to `page`. Raises MissingRequirement without an account, GuestMisbehaved
    when Google does not let it in.
    """
    account = await _account(context)
    await answering(context)
    async with context.cdp.browser() as browser:
        session = await new_tab(browser)
        if problem := await visit(browser, session, page, LOAD_SECONDS):
            raise GuestMisbehaved(f"Google's login was not reached: {problem}")
        if await _is_at(browser, session, page):
            return "was logged in already"
        await _answer(browser, session, EMAIL, account.email, AFTER_EMAIL)
        await _answer(browser, session, PASSWORD, account.password, AFTER_PASSWORD)
        await _until_at(browser, session, page)
    return ""


async def googledrive(context: Context, parameters: Parameters, *, api: str = API) -> str:
    """`operation`, each with its element of `args`, in order:

    delete   {query, trash=false}   what the query finds, files before folders, for good or into the bin
    mkdirs   {path}                 the folders of a path that are not there yet
    upload   {url, path}            a file that the task names by URL

    Raises MissingRequirement without ENVD_GOOGLE_CREDENTIALS, AssetUnavailable for an upload's URL, InfraError.
    """
    operations, arguments = list(parameters["operation"]), list(parameters["args"])
    if len(operations) != len(arguments):
        raise TaskInvalid(
            f"{len(operations)} operations have {len(arguments)} args.",
            errors=[{"field": "args", "message": "must be as many as operation"}],
        )
    drive = await Drive.configured(context, api)
    for operation, given in zip(operations, arguments, strict=True):
        match operation:
            case "delete":
                await drive.delete(str(given.get("query") or ""), trash=bool(given.get("trash")))
            case "mkdirs":
                await drive.make_folders(several(given["path"]))
            case "upload":
                await drive.upload(await context.assets.fetch(given["url"]), several(given["path"]))
            case _:
                raise TaskInvalid(
                    f"Google Drive has no operation {str(operation)[:60]!r}; it has delete, mkdirs and upload.",
                    errors=[{"field": "operation", "message": "must be delete, mkdirs or upload"}],
                )
    return ""


async def _account(context: Context) -> Account:
    file = context.settings.google_account
    hint = "Set ENVD_GOOGLE_ACCOUNT to a JSON file {email, password}."
    if file is None:
        raise _missing("The task logs in to Google, and no account is configured.", hint)
    try:
        return Account.model_validate(json.loads(await _read(file)))
    except ValidationError as error:
        at = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise _missing(f"{file} cannot be used: {at}: {error.errors()[0]['msg']}.", hint) from None  # it quotes
    except (OSError, ValueError) as error:
        raise _missing(f"{file} cannot be read: {error}.", hint) from error


async def _read(file: Path) -> bytes:
    return await anyio.Path(file).read_bytes()


def _missing(detail: str, hint: str) -> MissingRequirement:
    return MissingRequirement(detail, hint=hint, errors=[{"field": "login", "message": detail}])


async def _answer(browser: Browser, session: str, field: str, text: str, button: str) -> None:
    """Type into a field of the login once it is there, and go on to the next page."""
    what = f"{field} in Google's login"
    await _until(browser, session, SHOWN.format(json.dumps(field)), f"There was no {what}")
    await evaluate(browser, session, FOCUS.format(json.dumps(field)))
    await browser.send("Input.insertText", {"text": text}, session_id=session)
    await evaluate(browser, session, CLICK.format(json.dumps(button)))


async def _until_at(browser: Browser, session: str, page: str) -> None:
    arrived = f"location.host == {json.dumps(urlsplit(page).netloc)}"
    await _until(browser, session, arrived, "Google did not accept the login (it may ask for a second factor)")
    with anyio.move_on_after(FIELD_SECONDS):
        await loaded(browser, session)


async def _is_at(browser: Browser, session: str, page: str) -> bool:
    return bool(await evaluate(browser, session, f"location.host == {json.dumps(urlsplit(page).netloc)}"))


async def _until(browser: Browser, session: str, expression: str, otherwise: str) -> None:
    """Raises GuestMisbehaved when `expression` is not true in the page within FIELD_SECONDS."""
    deadline = time.monotonic() + FIELD_SECONDS
    while time.monotonic() < deadline:
        try:
            if await evaluate(browser, session, expression) is True:
                return
        except GuestMisbehaved:
            pass  # the page went on while it was asked
        await anyio.sleep(PAUSE)
    raise GuestMisbehaved(f"{otherwise} within {FIELD_SECONDS:g} s.")


STEPS: dict[str, Run] = {"login": login, "googledrive": googledrive}
