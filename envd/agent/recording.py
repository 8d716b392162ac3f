"""Recording the screen to a video, one at a time, with ffmpeg."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from pathlib import Path

from aiohttp import web

from envd.agent import x11
from envd.agent.errors import AgentError, BadRequest, MissingTool
from envd.agent.processes import dying_with_us, kill_group, start
from envd.agent.screen import Screen

_FRAMES_PER_SECOND = 30
_FAILS_WITHIN = 1.0
"""Seconds in which ffmpeg, if it cannot record at all, says so and ends."""
_CLOSE_SECONDS = 15
_LOG = "ffmpeg.log"
_VIDEO = "recording.mp4"
_CHUNK = 256 * 1024


class Recorder:
    """The one recording that may be under way."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._turn = asyncio.Lock()
        self._ffmpeg: asyncio.subprocess.Process | None = None
        self._directory: Path | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/start_recording", self.start_recording),
            web.post("/end_recording", self.end_recording),
        ]

    async def start_recording(self, request: web.Request) -> web.Response:
        async with self._turn:
            if self._ffmpeg is not None and self._ffmpeg.returncode is None:
                raise BadRequest("a recording is under way already; end it by /end_recording first")
            if shutil.which("ffmpeg") is None:
                raise MissingTool("ffmpeg", "ffmpeg")
            await self._forget()
            width, height = await self._screen.ask(x11.size)
            self._directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="envd-recording-"))
            self._ffmpeg = await self._record(width, height, self._directory)
            ended = asyncio.ensure_future(self._ffmpeg.wait())
            if (await asyncio.wait([ended], timeout=_FAILS_WITHIN))[0]:
                said = await asyncio.to_thread((self._directory / _LOG).read_text, errors="replace")
                await self._forget()
                raise AgentError(f"ffmpeg ended at once with code {ended.result()}: {said[-500:].strip()}")
            return web.json_response({"status": "success", "message": "Started recording."})

    async def end_recording(self, request: web.Request) -> web.StreamResponse:
        async with self._turn:
            if self._ffmpeg is None or self._directory is None:
                raise BadRequest("no recording is under way; /start_recording starts one")
            try:
                await _interrupt(self._ffmpeg)
                return await _sent(request, self._directory / _VIDEO)
            finally:
                await self._forget()

    def kill(self) -> None:
        if self._ffmpeg is not None and self._ffmpeg.returncode is None:
            kill_group(self._ffmpeg.pid)

    async def close(self) -> None:
        await self._forget()

    async def _record(self, width: int, height: int, directory: Path) -> asyncio.subprocess.Process:
        with await asyncio.to_thread((directory / _LOG).open, "wb") as log:
            command = dying_with_us(_command(width, height, directory))
            return await start(command, stdout=log, stderr=log, start_new_session=True)

    async def _forget(self) -> None:
        """End ffmpeg if it runs and remove what it wrote. Idempotent."""
        self.kill()
        if self._ffmpeg is not None:
            await self._ffmpeg.wait()
        if self._directory is not None:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
        self._ffmpeg = self._directory = None


def _command(width: int, height: int, directory: Path) -> list[str]:
    grab = f"-f x11grab -draw_mouse 1 -framerate {_FRAMES_PER_SECOND} -video_size {width}x{height}"
    # yuv420p needs even sides; ultrafast, since the desktop's own programs need the processor more.
    encode = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -vf crop=trunc(iw/2)*2:trunc(ih/2)*2"
    source = ["-i", os.environ.get("DISPLAY", ":0")]
    run = ["ffmpeg", "-y", "-nostdin", "-loglevel", "error", *grab.split(), *source, *encode.split()]
    return [*run, str(directory / _VIDEO)]


async def _sent(request: web.Request, video: Path) -> web.StreamResponse:
    """Send the video to its end, since it is removed afterwards; a FileResponse is sent after its handler is done."""
    try:
        file = await asyncio.to_thread(video.open, "rb")
    except OSError as error:
        raise AgentError(f"ffmpeg left no recording: {error.strerror}") from error
    with file:
        disposition = f'attachment; filename="{_VIDEO}"'
        response = web.StreamResponse(headers={"Content-Type": "video/mp4", "Content-Disposition": disposition})
        response.content_length = os.fstat(file.fileno()).st_size
        await response.prepare(request)
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            await response.write(chunk)
        await response.write_eof()
    return response


async def _interrupt(ffmpeg: asyncio.subprocess.Process) -> None:
    """Ask ffmpeg to finish the file."""
    if ffmpeg.returncode is not None:
        raise AgentError(f"the recording ended by itself, with code {ffmpeg.returncode}")
    os.kill(ffmpeg.pid, signal.SIGINT)
    if not (await asyncio.wait([asyncio.ensure_future(ffmpeg.wait())], timeout=_CLOSE_SECONDS))[0]:
        raise AgentError(f"ffmpeg did not finish the recording within {_CLOSE_SECONDS} s and was killed")
