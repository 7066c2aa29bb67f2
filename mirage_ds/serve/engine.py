"""The thread that decodes: requests come and go at any token, and all rows run together.

n rows that decode at the moment, m of them at slots of latent blocks, V vocabulary, H hidden.

Everything about rows happens in this one thread; others put what they want into its inbox. What an answer is follows
from its request alone: its draws from its seed, its latents from its own states.
"""

import logging
import secrets
import time
from asyncio import AbstractEventLoop, Queue
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge

from mirage_ds.analysis.controls.bank import Bank
from mirage_ds.analysis.controls.conditions import First, Given, fixed_slots
from mirage_ds.data.batch import Batch
from mirage_ds.data.sample import Sample
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, need_latents, run_limits, seeds_of, tokens_and_feed
from mirage_ds.evaluate.prompts import pack
from mirage_ds.evaluate.spec import Sampling
from mirage_ds.model.choose import Chooser, Turn, greedy, sampler
from mirage_ds.model.generate import Loop
from mirage_ds.model.kv_cache import bytes_of_block, on_device
from mirage_ds.model.slots import Latents, Limits, Slot, pause
from mirage_ds.serve.body import Asked, Refused
from mirage_ds.serve.spec import ServeSpec

log = logging.getLogger(__name__)


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
        answer: which of its request's, from 0; ended: it is the last one.
        state: (H,) what was fed at it, where it is a latent.
    """

    answer: int
    id: int
    ended: bool
    state: torch.Tensor | None


@dataclass(eq=False)
class Job:
    """A request as the engine knows it.

    Attributes:
        question: its evaluate.report.prompt_hash.
        prompt: a list that it is taken from when it is read; length: its tokens; new_tokens: of an answer, at most.
        first: number of its first answer among all.
        inbox: its tokens, or the Refused that ends it.
    """

    asked: Asked
    question: str
    prompt: list[Sample]
    length: int
    new_tokens: int
    first: int = -1
    inbox: Queue[Token | Refused] = field(default_factory=Queue)

    @property
    def numbers(self) -> range:
        """Those of its answers."""
        return range(self.first, self.first + self.asked.n)

    async def token(self) -> Token:
        """Wait for a token of any of its answers; Refused where none will be any more."""
        found = await self.inbox.get()
        if isinstance(found, Refused):
            raise found
        return found


class Engine:
    """Decodes what is submitted, once it has started.

    Attributes:
        registry: its numbers, for Prometheus.

    Raises:
        UserError: the model has no latents that spec.latents could replace, or they cannot be made.
    """

    def __init__(self, decoder: Decoder, spec: ServeSpec):
        if spec.latents != "own" or spec.latent_bank:
            need_latents(decoder)
        room = spec.model_dump(include={"prefill_tokens", "rows", "cache_gb"})
        self.limits = run_limits(decoder, spec.max_new_tokens, Limits.longest_run, spec.run_length, **room)
        self.decoder, self.model, self.spec = decoder, decoder.loaded.model, spec
        slots = decoder.trained.get("slots")
        self.tokens, self._other = tokens_and_feed(self.model, decoder.encoder, decoder.latents, slots)
        self._barred = [self.tokens.pad, self.tokens.start, self.tokens.end] if spec.latents == "off" else []
        own = spec.latents == "own"
        shape = fixed_slots(decoder, self.limits) if spec.latent_bank else 0, self.model.head.weight.shape[1]
        self._bank = Bank(spec.latent_bank, spec.latents, shape, spec.seed) if spec.latent_bank and not own else None
        # By the numbers of the answers: the vectors that one is fed, or the first state of its block.
        self._known: dict[int, torch.Tensor] = {}
        feeds: dict[str, Latents] = {
            "first": First(self._known),
            "zero": lambda slots, own: torch.zeros_like(own),
            "random": self._random,
            "text": pause(self.model, self.tokens.pad),
        }
        self._other = Given(self._known) if self._bank else feeds.get(spec.latents, self._other)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # By the numbers of the answers, those that wait among them.
        self._rows: dict[int, Job] = {}
        self._seeds: dict[int, int] = {}
        self._samplers: dict[Sampling, Chooser] = {}
        self._asked, self._end, self._over = 0, float("inf"), False
        self._thread = Thread(target=self._run, name="decode", daemon=True)
        self._loop = self._new_loop()
        self.registry = CollectorRegistry()
        self._decoded = Counter("mirage_tokens", "Decoded tokens and latents.", registry=self.registry)
        self._prefilled = Counter("mirage_prefill_tokens", "Prompt tokens that were read.", registry=self.registry)
        rows = Gauge("mirage_rows", "Answers.", ["state"], registry=self.registry)
        rows.labels("running").set_function(lambda: len(self._loop.live))
        rows.labels("waiting").set_function(lambda: max(0, len(self._rows) - len(self._loop.live)))
        cache, size = Gauge("mirage_cache_bytes", "", ["state"], registry=self.registry), bytes_of_block(self.model)
        cache.labels("reserved").set_function(lambda: self._loop.cache.reserved * size)
        cache.labels("allocated").set_function(lambda: len(self._loop.cache.keys[0]) * size)

    def start(self, readers: AbstractEventLoop) -> None:
        """Begin; `readers` is the event loop in which the jobs' tokens are waited for."""
        self._readers = readers
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Decode a job's answers; called by one thread alone."""
        job.first, self._asked = self._asked, self._asked + job.asked.n
        self._inbox.put(partial(self._add, job))

    def cancel(self, job: Job, answer: int | None = None) -> None:
        """End an answer, or all of a job, before the next token; what has ended is left alone."""
        self._inbox.put(partial(self._drop, job.numbers if answer is None else [job.first + answer]))

    def close(self, grace: float) -> None:
        """End what still runs after so many seconds. A signal's handler may call it."""
        self._end = min(self._end, time.monotonic() + grace)

    def join(self) -> None:
        """End the thread, and with it whatever runs."""
        self.close(0)
        self._inbox.put(lambda: setattr(self, "_over", True))
        self._thread.join()

    # ------------------------------------------------------------------------------------------------- in the thread

    @torch.no_grad()
    def _run(self) -> None:
        while not self._over:
            try:
                self._listen()
                if time.monotonic() > self._end:
                    self._end_all(Refused(503, "the server is stopping"))
                self._turn()
            except Exception as error:  # whatever it is, it ends those that run, and not the server
                log.exception("decoding failed")
                full = isinstance(error, torch.OutOfMemoryError)
                what = "the GPU's memory is full" if full else f"{type(error).__name__}; the server's log has it"
                self._end_all(Refused(503 if full else 500, f"decoding failed: {what}"))

    def _listen(self) -> None:
        """Do what was asked for; wait for it where there is nothing else to do."""
        wait = not self._rows
        with suppress(Empty):
            while True:
                self._inbox.get(block=wait)()
                wait = False

    def _say(self, job: Job, what: Token | Refused) -> None:
        # There may be no reader any more.
        with suppress(RuntimeError):
            self._readers.call_soon_threadsafe(job.inbox.put_nowait, what)

    def _add(self, job: Job) -> None:
        try:
            self._loop.add(job.first, job.length, job.asked.n, job.new_tokens)
        except UserError as error:
            self._say(job, Refused(400, str(error), "messages", "context_length_exceeded"))
            return
        seed = secrets.randbits(32) if job.asked.seed is None else job.asked.seed % 2**32
        self._rows |= dict.fromkeys(job.numbers, job)
        self._seeds |= zip(job.numbers, seeds_of(seed, 0, job.asked.n), strict=True)
        if self._bank:
            self._known |= dict.fromkeys(job.numbers, self._bank.of(job.question))

    def _drop(self, numbers: Sequence[int]) -> None:
        gone = self._rows.keys() & set(numbers)
        self._loop.drop(gone)
        for number in gone:
            self._known.pop(number, None)
            del self._rows[number], self._seeds[number]

    def _end_all(self, why: Refused) -> None:
        for job in set(self._rows.values()):
            self._say(job, why)
        self._rows, self._seeds = {}, {}
        self._known.clear()
        self._loop = self._new_loop()

    def _new_loop(self) -> Loop:
        return Loop(self.model, self.limits, self._read, record=True, off=lambda number: self.spec.latents == "off")

    def _turn(self) -> None:
        """Let answers begin, and decode one token of every row."""
        self._loop.enter(self.limits.prefill_tokens)
        if not (rows := list(self._loop.live)):
            return
        had = [len(row.made.ids) for row in rows]
        ended = {row.number for row in self._loop.step(self.tokens, self._choose, self._other)}
        for row, before in zip(rows, had, strict=True):
            made = row.made
            self._decoded.inc(len(made.ids) - before)
            # Another answer of its request may have been broken.
            if (job := self._rows.get(row.number)) and row.broken:
                self._say(job, Refused(500, "the logits are not finite: a weight is NaN"))
                self._drop(job.numbers)
            elif job:
                # A block's latents may come together.
                for at in range(before, len(made.ids)):
                    state = made.latents[made.fed[:at].count("H")] if made.fed[at : at + 1] == "H" else None
                    over = row.number in ended and at + 1 == len(made.ids)
                    self._say(job, Token(row.number - job.first, made.ids[at], over, state))
        self._drop([*ended])

    def _read(self, numbers: Sequence[int]) -> Batch:
        """Pack prompts, each named by the number of its first answer; see generate.Loop."""
        prompts = [self._rows[number].prompt.pop() for number in numbers]
        self._prefilled.inc(sum(len(one.input_ids) for one in prompts))
        return pack(self.model, self.decoder.tower, self.decoder.encoder, prompts)

    def _choose(self, logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        """Choose tokens (n,) from logits (n, V), rows that are drawn alike together; see choose.Chooser."""
        if self._barred:
            logits[:, self._barred] = -torch.inf
        alike: dict[Sampling | None, list[int]] = defaultdict(list)
        for place, turn in enumerate(turns):
            alike[self._rows[turn.row].asked.sampling].append(place)
        known = self._samplers
        self._samplers = {one: known.get(one) or sampler(*one, self._seeds) for one in alike if one}
        chosen = torch.empty(len(turns), dtype=torch.long, device=logits.device)
        for one, places in alike.items():
            at, choose = on_device(places, logits.device), self._samplers[one] if one else greedy
            # Those of a single kind need no copy.
            chosen[at] = choose(logits if len(alike) == 1 else logits[at], [turns[place] for place in places])
        return chosen

    def _random(self, slots: Sequence[Slot], own: torch.Tensor) -> torch.Tensor:
        """Draw directions (m, H), each as long as the state that it stands for."""
        drawn = torch.empty(own.shape)
        for row, (number, block, slot) in enumerate(slots):
            seed = ((int(self._rows[number].question, 16) + self.spec.seed) * 1_009 + block) * 1_009 + slot
            drawn[row].normal_(generator=torch.Generator().manual_seed(seed % 2**63))
        return torch.nn.functional.normalize(drawn).to(own) * own.norm(dim=1, keepdim=True)
