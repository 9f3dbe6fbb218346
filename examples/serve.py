"""A detector behind HTTP, with limits on what it takes; needs cpc_fast[serve].

python examples/serve.py runs/parts            then: curl -F images=@part.png http://127.0.0.1:8000/score
"""

import argparse
import asyncio

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from cpc_fast.detector import Detector
from cpc_fast.errors import CpcFastError
from cpc_fast.images import read_image
from cpc_fast.report import printable

MAX_BODY, MAX_FILES, MAX_PIXELS, MAX_WAITING, SECONDS = 32 << 20, 8, 1 << 24, 8, 30


def make_app(detector: Detector) -> FastAPI:
    app, one_at_a_time, waiting = FastAPI(), asyncio.Lock(), set()

    def answer(name: str, data: bytes) -> dict:
        try:
            image = read_image(name, data, detector.config.depth)  # refuses bombs before it decodes them
            if image.shape[0] * image.shape[1] > MAX_PIXELS:
                return {"name": name, "error": f"more than {MAX_PIXELS} pixels; cut it into pieces."}
            found = detector.inspect(image)
        except CpcFastError as error:
            return {"name": name, "error": str(error)}
        segments = [{"box": segment.box, "area": segment.area, "peak": segment.peak} for segment in found.segments]
        return {
            "name": name,
            "score": found.score,
            "flagged": found.flagged,
            "other_light": found.other_light,
            "segments": segments,
        }

    async def upload(request: Request) -> list[tuple[str, bytes]]:
        size = 0

        async def limited() -> dict:
            nonlocal size
            message = await request.receive()
            if (size := size + len(message.get("body", b""))) > MAX_BODY:
                raise HTTPException(413, f"more than {MAX_BODY} bytes")
            return message

        async with (
            asyncio.timeout(SECONDS),
            Request(request.scope, limited).form(max_files=MAX_FILES, max_fields=0) as form,
        ):
            files = [value for _, value in form.multi_items() if not isinstance(value, str)]
            return [(printable(file.filename or "image"), await file.read()) for file in files]

    @app.post("/score")
    async def score(request: Request) -> list[dict]:
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes")
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "send images as multipart/form-data: curl -F images=@part.png ...")
        if len(waiting) >= MAX_WAITING:
            raise HTTPException(503, "too many requests at once; try again", {"Retry-After": "1"})
        waiting.add(request)
        try:
            images = await upload(request)
            if not images:
                raise HTTPException(400, "there is no image in the request")
            async with one_at_a_time:
                return [await run_in_threadpool(answer, *image) for image in images]
        except TimeoutError:
            raise HTTPException(408, f"the request took more than {SECONDS} s to arrive") from None
        finally:
            waiting.discard(request)

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(make_app(Detector.load(options.run)), port=options.port, ws="none")
