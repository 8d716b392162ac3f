"""An account at AWS that misbehaves when it is told to: a proxy in front of moto's server, in threads of this process.

    with faulty_account() as aws:
        aws.fail("ec2:RunInstances", "InsufficientInstanceCapacity")
        ...
        assert "scheduler:CreateSchedule" in aws.calls

It hears every call by the name that policies have for it, and adds what moto leaves out: a client token launches once,
an instance may be hidden or pending at first, and root volumes can be replaced. `aws.client(…)` goes past it.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

from aws_cloud import Account, account

PATIENCE = 30.0
"""Seconds within which what a test waits for has happened."""
CHANGES = {f"ec2:{verb}Instances" for verb in ("Run", "Start", "Stop", "Terminate")}
XML = "http://ec2.amazonaws.com/doc/2016-11-15/"
SCHEDULES = {"POST": "CreateSchedule", "GET": "GetSchedule", "PUT": "UpdateSchedule", "DELETE": "DeleteSchedule"}
Answer = tuple[int, dict[str, str], bytes]
Rewrite = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Call:
    """One that was heard. `parameters` are those of a form, by the names of AWS's API: `TagSpecification.1.Tag.1.Key`;
    `body` is what was sent, of any."""

    action: str
    parameters: Mapping[str, str]
    body: str = ""


class Held:
    """A call that waits in the proxy, before or after moto did it."""

    def __init__(self) -> None:
        self.forwards = True
        self._reached = threading.Event()
        self._let_go = threading.Event()

    async def reached(self) -> None:
        """Return once it waits."""
        assert await asyncio.to_thread(self._reached.wait, PATIENCE), "the call was never made"

    def release(self) -> None:
        """It goes on."""
        self._let_go.set()

    def drop(self) -> None:
        """It ends here: moto never hears of it if it did not before, and whoever made it hears nothing."""
        self.forwards = False
        self._let_go.set()

    def wait(self) -> bool:
        """Of the proxy. Whether it goes on."""
        self._reached.set()
        self._let_go.wait(2 * PATIENCE)
        return self.forwards


@dataclass
class Fault:
    """What becomes of calls of `action`: of `times` of them, after the first `skip`. None is all."""

    action: str
    skip: int = 0
    times: int | None = 1
    refusal: Answer | None = None
    delay: float = 0.0
    cut: bool = False
    before: Held | None = None
    after: Held | None = None
    rewrite: Rewrite | None = None

    def strikes(self) -> bool:
        """For one call more."""
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True


class Faults:
    """What was heard, and what is to go wrong. Used by the threads of the proxy and by tests at once."""

    def __init__(self, moto: str) -> None:
        self.moto = moto
        self.heard: list[Call] = []
        self.hidden_s = 0.0
        self.pending_s = 0.0
        self.replace_s = 0.2
        self.replaced: Counter[str] = Counter()
        self.listeners: list[Callable[[], None]] = []
        self._faults: list[Fault] = []
        self.launched: dict[str, tuple[str, Answer]] = {}
        self._launched_at: dict[str, float] = {}
        self._tasks: dict[str, tuple[str, float, bool]] = {}
        self._guard = threading.Lock()
        self._launching = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._guard:
            self._faults.append(fault)

    def take(self, action: str) -> list[Fault]:
        with self._guard:
            return [fault for fault in self._faults if fault.action == action and fault.strikes()]

    def clear(self) -> None:
        """From here on nothing goes wrong, and what is held ends."""
        with self._guard:
            gone, self._faults = self._faults, []
        for fault in gone:
            for held in (fault.before, fault.after):
                if held is not None:
                    held.drop()

    def answer(self, call: Call, forward: Callable[[], Answer]) -> Answer:
        """As AWS would, where moto would not. Who listens has heard of it before it is answered."""
        replaced = self.replaced.total()
        answer = self._answered(call, forward)
        if call.action in CHANGES or self.replaced.total() != replaced:
            for listener in tuple(self.listeners):
                listener()
        return answer

    def _answered(self, call: Call, forward: Callable[[], Answer]) -> Answer:
        match call.action:
            case "ec2:RunInstances":
                return self._run(call, forward)
            case "ec2:DescribeInstances":
                return self._describe(call, forward())
            case "ec2:TerminateInstances":
                return _terminated(call, forward())
            case "ec2:CreateReplaceRootVolumeTask":
                return self._replace(call)
            case "ec2:DescribeReplaceRootVolumeTasks":
                return self._replacing(call)
        return forward()

    def _run(self, call: Call, forward: Callable[[], Answer]) -> Answer:
        """A token launches once: the same call has the same answer, another one with the same token is refused."""
        token = call.parameters.get("ClientToken", "")
        with self._launching:
            if token in self.launched:
                asked, answer = self.launched[token]
                return answer if asked == call.body else refused("ec2", "IdempotentParameterMismatch")
            answer = forward()
            if answer[0] == 200:
                if token:
                    self.launched[token] = (call.body, answer)
                for instance_id in re.findall(rb"<instanceId>(i-\w+)</instanceId>", answer[2]):
                    self._launched_at[instance_id.decode()] = time.monotonic()
        return answer

    def _describe(self, call: Call, answer: Answer) -> Answer:
        status, headers, body = answer
        if status != 200 or not (self.hidden_s or self.pending_s):
            return answer
        asked = {value for key, value in call.parameters.items() if key.startswith("InstanceId.")}
        if hidden := {instance_id for instance_id in asked if self._younger(instance_id, self.hidden_s)}:
            return refused("ec2", "InvalidInstanceID.NotFound", f"The instance ID '{min(hidden)}' does not exist")
        root = ElementTree.fromstring(body)
        for instances in root.findall(".//{*}instancesSet"):
            for item in list(instances):
                instance_id = item.findtext("{*}instanceId", "")
                if self._younger(instance_id, self.hidden_s):
                    instances.remove(item)
                elif self._younger(instance_id, self.pending_s):
                    _say(item, "pending", 0, unless="terminated")
        return status, headers, ElementTree.tostring(root)

    def _younger(self, instance_id: str, seconds: float) -> bool:
        launched = self._launched_at.get(instance_id)
        return launched is not None and time.monotonic() < launched + seconds

    def _replace(self, call: Call) -> Answer:
        instance_id = call.parameters["InstanceId"]
        task = f"replacevol-{len(self._tasks):017x}"
        self._tasks[task] = (instance_id, time.monotonic() + self.replace_s, False)
        return _xml("CreateReplaceRootVolumeTask", f"<replaceRootVolumeTask>{self._task(task)}</replaceRootVolumeTask>")

    def _replacing(self, call: Call) -> Answer:
        asked = [value for key, value in call.parameters.items() if key.startswith("ReplaceRootVolumeTaskId.")]
        items = "".join(f"<item>{self._task(task)}</item>" for task in asked or self._tasks)
        return _xml("DescribeReplaceRootVolumeTasks", f"<replaceRootVolumeTaskSet>{items}</replaceRootVolumeTaskSet>")

    def _task(self, task: str) -> str:
        instance_id, ends, counted = self._tasks[task]
        over = time.monotonic() >= ends
        if over and not counted:
            self._tasks[task] = (instance_id, ends, True)
            self.replaced[instance_id] += 1
        told = {
            "replaceRootVolumeTaskId": task,
            "instanceId": instance_id,
            "taskState": "succeeded" if over else "in-progress",
            "startTime": "2026-11-23T02:10:00Z",
            "deleteReplacedRootVolume": "true",
        }
        return "".join(f"<{key}>{value}</{key}>" for key, value in told.items())


@dataclass(frozen=True)
class FaultyAccount(Account):
    """`environ["AWS_ENDPOINT_URL"]` is the proxy; `url` and `client` are past it."""

    faults: Faults = field(default_factory=lambda: Faults(""))

    @property
    def calls(self) -> set[str]:
        """Every action that was called through the proxy, as policies name it."""
        return {call.action for call in self.faults.heard}

    def count(self, action: str) -> int:
        return sum(1 for call in self.faults.heard if call.action == action)

    def fail(
        self,
        action: str,
        code: str,
        message: str = "No.",
        *,
        status: int = 400,
        skip: int = 0,
        times: int | None = 1,
    ) -> None:
        """Refuse calls with AWS's error `code`, of which moto hears nothing."""
        answer = refused(action.partition(":")[0], code, message, status)
        self.faults.add(Fault(action, skip, times, refusal=answer))

    def delay(self, action: str, seconds: float, *, skip: int = 0, times: int | None = 1) -> None:
        """Answer so much later."""
        self.faults.add(Fault(action, skip, times, delay=seconds))

    def cut(self, action: str, *, skip: int = 0, times: int | None = 1) -> None:
        """Do it, and close the connection without a word."""
        self.faults.add(Fault(action, skip, times, cut=True))

    def hold(self, action: str, when: Literal["before", "after"], *, skip: int = 0) -> Held:
        """Keep one call waiting before or after it is done."""
        held = Held()
        self.faults.add(Fault(action, skip, **{when: held}))  # type: ignore[arg-type]  # the two fields are Held
        return held

    def rewrite(self, action: str, how: Rewrite, *, skip: int = 0, times: int | None = None) -> None:
        """Change what is answered."""
        self.faults.add(Fault(action, skip, times, rewrite=how))

    def forget_tokens(self) -> None:
        """From here on launches may have the tokens of earlier ones, as if a day had passed."""
        self.faults.launched.clear()

    def settled(self) -> None:
        """From here on nothing goes wrong."""
        self.faults.clear()


@contextmanager
def faulty_account() -> Iterator[FaultyAccount]:
    """A fresh one. Within the block this process is in it."""
    with account() as plain:
        faults = Faults(plain.url)
        server = _Server(("127.0.0.1", 0), _Handler)
        server.faults = faults
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            with patch.dict(os.environ, {"AWS_ENDPOINT_URL": url}):
                known = {one.name: getattr(plain, one.name) for one in fields(plain)}
                made = FaultyAccount(**known, faults=faults)
                yield replace(made, environ={**plain.environ, "AWS_ENDPOINT_URL": url})
        finally:
            faults.clear()
            server.shutdown()
            server.server_close()
            thread.join(PATIENCE)


def said(state: str, code: int, reason: tuple[str, str] | None = None) -> Rewrite:
    """Of DescribeInstances: every instance is in this state, with `reason` (code, message)."""

    def rewrite(body: bytes) -> bytes:
        root = ElementTree.fromstring(body)
        for instances in root.findall(".//{*}instancesSet"):
            for item in instances:
                _say(item, state, code, reason)
        return ElementTree.tostring(root)

    return rewrite


def refused(service: str, code: str, message: str = "No.", status: int = 400) -> Answer:
    """As the service's protocol has it."""
    if service == "ec2":
        body = (
            f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
            "<RequestID>0f3a-request</RequestID></Response>"
        )
        return status, {"Content-Type": "text/xml"}, body.encode()
    if service in ("iam", "sts"):
        body = (
            f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
            "<RequestId>0f3a-request</RequestId></ErrorResponse>"
        )
        return status, {"Content-Type": "text/xml"}, body.encode()
    told = '{"__type": "%s", "message": "%s", "Message": "%s"}' % (code, message, message)  # noqa: UP031 - braces
    return status, {"Content-Type": "application/json", "x-amzn-ErrorType": code}, told.encode()


def _terminated(call: Call, answer: Answer) -> Answer:
    """What has ended may be told so again; moto then looks for its network interface."""
    if b"InvalidNetworkInterfaceID.NotFound" not in answer[2]:
        return answer
    ids = [value for key, value in call.parameters.items() if key.startswith("InstanceId.")]
    state = "<currentState><code>48</code><name>terminated</name></currentState>"
    items = "".join(f"<item><instanceId>{instance_id}</instanceId>{state}</item>" for instance_id in ids)
    return _xml("TerminateInstances", f"<instancesSet>{items}</instancesSet>")


def _say(item: Any, state: str, code: int, reason: tuple[str, str] | None = None, unless: str = "") -> None:
    told = item.find("{*}instanceState")
    name = told.find("{*}name")
    if name.text == unless:
        return
    name.text, told.find("{*}code").text = state, str(code)
    if reason is not None:
        for old in item.findall("{*}stateReason"):
            item.remove(old)
        why = ElementTree.SubElement(item, "stateReason")
        for key, text in zip(("code", "message"), reason, strict=True):
            ElementTree.SubElement(why, key).text = text


def _xml(operation: str, inside: str) -> Answer:
    body = f'<{operation}Response xmlns="{XML}"><requestId>0f3a</requestId>{inside}</{operation}Response>'
    return 200, {"Content-Type": "text/xml"}, body.encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    faults: Faults


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = self._call(body)
        faults = self.server.faults
        faults.heard.append(call)
        strikes = faults.take(call.action)
        if not all(fault.before.wait() for fault in strikes if fault.before):
            self.close_connection = True
            return
        refusals = [fault.refusal for fault in strikes if fault.refusal]
        answer = refusals[0] if refusals else faults.answer(call, lambda: self._forwarded(body))
        for fault in strikes:
            time.sleep(fault.delay)
            if fault.rewrite and answer[0] == 200:
                answer = (answer[0], answer[1], fault.rewrite(answer[2]))
        goes_on = all(fault.after.wait() for fault in strikes if fault.after)
        if not goes_on or any(fault.cut for fault in strikes):
            self.close_connection = True
            return
        self._reply(answer)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, format: str, *arguments: object) -> None: ...

    def _call(self, body: bytes) -> Call:
        scope = re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/", self.headers.get("Authorization", ""))
        service = scope[1] if scope else "unsigned"
        if target := self.headers.get("X-Amz-Target"):
            return Call(f"{service}:{target.rpartition('.')[2]}", {}, body.decode())
        if service == "scheduler":
            listed = urlsplit(self.path).path.rstrip("/") == "/schedules"
            return Call(f"scheduler:{'ListSchedules' if listed else SCHEDULES[self.command]}", {}, body.decode())
        form = {key: values[0] for key, values in parse_qs(body.decode(), keep_blank_values=True).items()}
        return Call(f"{service}:{form.get('Action', self.path)}", form, body.decode())

    def _forwarded(self, body: bytes) -> Answer:
        at = urlsplit(self.server.faults.moto)
        connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=PATIENCE)
        try:
            headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _reply(self, answer: Answer) -> None:
        status, headers, body = answer
        try:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # whoever asked is gone
            self.close_connection = True
