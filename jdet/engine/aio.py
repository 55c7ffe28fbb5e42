"""The engine for asyncio: many tasks submit and stream, one thread computes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jdet.completion import Completion
from jdet.engine.engine import Engine
from jdet.engine.handle import Delta, DeltaReader, Handle
from jdet.sampling import SamplingParams


class AsyncEngine:
    """Wraps an `Engine`, which nobody else may use meanwhile.

    Every call of the engine is made by one thread of its own, so that the event loop never
    waits for the device. Steps run for as long as somebody waits for a result. Use it as a
    context manager, or call `close`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jdet-engine")
        self._stepping: asyncio.Task[bool] | None = None

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let a step that has begun come to its end, and give the thread back."""
        if self._stepping is not None:
            await asyncio.wait([self._stepping])
        self._thread.shutdown()

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[Delta]:
        """The samples' tokens as they come; leaving the loop early cancels the request.

        Raises:
          ValueError: as `Engine.submit`.
        """
        handle = await self._call(lambda: self._engine.submit(prompt, sampling, request_id))
        reader = DeltaReader(self._engine.model, handle)
        try:
            while not reader.done:
                for delta in await self._call(reader.read):
                    yield delta
                if not handle.done:
                    await self._next_step()
        finally:
            if not handle.done:
                self._thread.submit(self._engine.cancel, handle)

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> list[Completion]:
        """The completions of one prompt, by sample; cancelling the task cancels the request.

        Raises:
          ValueError: as `Engine.submit`.
        """
        handle = await self._call(lambda: self._engine.submit(prompt, sampling, request_id))
        return await self._finished(handle)

    async def _finished(self, handle: Handle) -> list[Completion]:
        try:
            while not handle.done:
                await self._next_step()
        finally:
            if not handle.done:
                self._thread.submit(self._engine.cancel, handle)
        return await self._call(lambda: self._engine.completions(handle))

    async def _call[T](self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _next_step(self) -> None:
        """Wait for a step that all who wait share; the first of them begins it."""
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._call(self._engine.step))
        # A task that is cancelled meanwhile leaves the step to the others.
        await asyncio.shield(self._stepping)
