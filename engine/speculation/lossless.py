"""Lossless decoding: drafts are verified by the model's own dense weights, several tokens in one call.

One key/value cache serves both. Drafts at positions behind the text are written by the drafter first, and written again
by the verifier, densely; those of drafts that did not stand lie behind the text, where they are written before they are
read. The verifier gives each token the bits of a dense step, so that greedy text is the dense one: on the CPU the step
itself (engine/cpu_step.py), on CUDA a pass in a graph of its own (engine/verify_step.py), of which a dense step is one
over a single token.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.cache import first_row_kept, new_cache
from teal_fast.engine.drawn import Drawing, Drawn
from teal_fast.engine.request import STEPPED, Request
from teal_fast.engine.speculation.controller import Arm, Controller
from teal_fast.engine.speculation.drafters import Draft, Drafter, DraftModel, Draw, ModelDrafter, NGram, likeliest
from teal_fast.engine.speculation.marks import mark, seconds
from teal_fast.engine.speculation.statistics import Statistics
from teal_fast.engine.steps import Step
from teal_fast.engine.verify_step import VerifyStep, check_verifiable
from teal_fast.files.calibration import Calibration
from teal_fast.files.paths import command
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import format_of, with_own_thresholds

MOST_DRAFTS = 15  # with the token before them what the step reads the weights once for
MOST_CHOSEN = 7  # of a model's drafts: later ones hardly ever pay, and all are drafted before one is verified
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.6)  # that are chosen among
# How often a greedy draft of the demo stood at these sparsities, over 300 tokens of chat; int8 alone 0.97.
STANDS = {0.0: 0.99, 0.25: 0.93, 0.4: 0.84, 0.5: 0.74, 0.6: 0.66}
STANDS_ROUNDED = {"int8": 0.98, "int4": 0.88}  # what rounding leaves of that
STANDS_OTHER = 0.7  # of another model
MATCHES = {2: 0.35, 3: 0.5, 4: 0.7}  # by the length of an n-gram
SELF, NGRAM, AUTO = "self", "ngram", "auto"


class Offer(NamedTuple):
    """A way to draft now, at most `longest` tokens, by a drafter's name and sparsity."""

    arm: Arm
    longest: int
    name: str
    sparsity: float


class Lossless:
    """Drafts for the answers of one engine, one after another. statistics: of the last one.

    step: the engine's, over its cache. make_step: makes a drafter's. models: what may draft besides the model itself.
    """

    def __init__(
        self,
        model: Transformer,
        calibration: Calibration | None,
        cache: KVCache,
        step: Step,
        make_step: Callable[[Transformer, KVCache], Step],
        models: Iterable[DraftModel] = (),
    ):
        self.step, self.cache, self.make_step = step, cache, make_step
        self.model, self.calibration, self.others = model, calibration, models
        self.controller, self.ngram, self.statistics = Controller(), NGram(), Statistics()
        self.drafters: dict[str, ModelDrafter] = {}
        self.arms: dict[tuple[str, float], Arm] = {}

    @cached_property
    def models(self) -> dict[str, DraftModel]:
        """What may draft, by name; on demand, since a twin of the model takes half as long as a small one's load."""
        own = DraftModel(SELF, with_own_thresholds(self.model), self.calibration, shared=True)
        return {draft.name: draft for draft in (own, *self.others)}

    @cached_property
    def verifier(self) -> Step | VerifyStep:
        """What computes several tokens at once; on demand, since on CUDA it takes seconds and memory of its own."""
        return self.step if hasattr(self.step, "dense") else VerifyStep(self.model, self.cache)

    @property
    def stepped(self) -> float:
        """As made at which sparsity the keys and values of the engine's own dense steps count."""
        return 0.0 if hasattr(self.step, "dense") else STEPPED

    def check(self, request: Request) -> None:
        """Raises ValueError on a lossless request that can't be served."""
        if not hasattr(self.step, "dense"):
            if self.model.norm.weight.is_cuda:
                check_verifiable(self.model)
            if self.step.mode == "plain":
                said = "verifies several tokens at once, which a plain step does not"
                raise ValueError(f"lossless {said}: leave it out, or decode without --eager")
        if (border := self.model.args.longest_plain or self.cache.length) < self.cache.length:
            said = f"beyond which its keys may have to be made again, and this context has room for {self.cache.length}"
            raise ValueError(
                f"lossless serves this model up to {border} tokens, {said}: take a smaller context, or leave it out"
            )
        known = (AUTO, NGRAM, *self.models)
        if request.draft not in known:
            raise ValueError(f"draft {request.draft!r} is not known here, expected {' or '.join(known)}")
        if (count := request.draft_tokens) is not None and not 1 <= count <= MOST_DRAFTS:
            raise ValueError(f"draft_tokens {count}: expected a whole number from 1 to {MOST_DRAFTS}, or auto")
        sparsity = request.draft_sparsity
        if sparsity is not None and (request.draft == NGRAM or (request.draft == SELF and sparsity == 0)):
            what = "ngram reads no weights" if request.draft == NGRAM else "at 0 self is the dense model"
            raise ValueError(f"draft_sparsity {sparsity} beside draft {request.draft}: {what}, leave one of them out")
        drafting = [self.models[name] for name in self._names(request)]
        if (sparsity or request.draft == SELF) and not any(draft.calibration for draft in drafting):
            raise ValueError(
                f"a sparse draft by {' or '.join(draft.name for draft in drafting)} needs a calibration, and there is "
                f"none: run `{command('calibrate')}` first, or draft by ngram"
            )

    def begin(self, request: Request, first: Drawn, stop: Collection[int], drawing: Drawing) -> "Cycles":
        """The cycles of an answer whose first token is drawn. The request must have been checked."""
        self.controller.begin()
        self.statistics = Statistics()
        text = [*request.prompt, first.wait()[0]]
        return Cycles(self, request, text, stop, drawing, self.offers(request))

    def _names(self, request: Request) -> list[str]:
        """Of the models that may draft."""
        return {AUTO: list(self.models), NGRAM: []}.get(request.draft, [request.draft])

    def offers(self, request: Request) -> list[Offer]:
        """Ways to draft by models, in the whole answer."""
        found, wanted = [], request.draft_sparsity
        longest = MOST_CHOSEN if request.draft_tokens is None else self.most
        for name in self._names(request):
            for sparsity in SPARSITIES if wanted is None else (wanted,):
                if self.models[name].calibration is not None if sparsity else name != SELF:
                    if (name, sparsity) not in self.arms:
                        self.arms[name, sparsity] = self._arm(self.models[name], sparsity)
                    found.append(Offer(self.arms[name, sparsity], longest, name, sparsity))
        return found

    def found_before(self, request: Request, text: Sequence[int]) -> list[Offer]:
        """The way to draft what followed the text's last tokens before, where there is one now."""
        if request.draft not in (AUTO, NGRAM) or not (n := self.ngram.match(text)[0]):
            return []
        arm = self.arms.setdefault((NGRAM, n), Arm(NGRAM, MATCHES[n], 0.0))
        return [Offer(arm, self.most, NGRAM, 0.0)]

    @property
    def most(self) -> int:
        """Drafts that can be verified at once."""
        return min(MOST_DRAFTS, getattr(self.verifier, "most", MOST_DRAFTS + 1) - 1)

    def _arm(self, draft: DraftModel, sparsity: float) -> Arm:
        nearest = min(STANDS, key=lambda known: abs(known - sparsity))
        rounding = STANDS_ROUNDED.get(format_of(draft.model), 0.93) if draft.name != SELF else 1.0
        share = STANDS[nearest] * (rounding if draft.shared else STANDS_OTHER)
        cost = bytes_per_token(draft.model, sparsity) / bytes_per_token(self.model, 0.0)
        name = f"{draft.name} at {sparsity:.0%}" if draft.calibration is not None else draft.name
        return Arm(name, share, cost)

    def drafter(self, offer: Offer) -> Drafter:
        """What drafts for an offer that is taken."""
        if offer.name == NGRAM:
            return self.ngram
        if offer.name not in self.drafters:
            draft = self.models[offer.name]
            length = min(self.cache.length, draft.model.args.max_position)
            cache = self.cache if draft.shared else new_cache(draft.model, length)
            with first_row_kept(cache):  # which a step's capture writes
                self.drafters[offer.name] = ModelDrafter(draft, self.make_step(draft.model, cache), length)
        drafter = self.drafters[offer.name]
        drafter.set_sparsity(offer.sparsity)
        return drafter


@dataclass
class Cycles:
    """One answer: each cycle drafts some tokens, verifies them, and gives those that stand and one more.

    text: all tokens so far; keys and values lack the last one's. stop: ids that end it. drawing: draws its tokens.
    offers: ways to draft by models.
    """

    lossless: Lossless
    request: Request
    text: list[int]
    stop: Collection[int]
    drawing: Drawing
    offers: list[Offer]

    def run(self, room: int) -> list[Drawn]:
        """The next tokens, at most `room`."""
        text = self.text
        lossless, request, device = self.lossless, self.request, self.lossless.model.norm.weight.device
        offers = [*lossless.found_before(request, text), *self.offers]
        limits = [(offer.arm, min(offer.longest, room - 1)) for offer in offers]
        arm, count = lossless.controller.choose(limits, request.draft_tokens)
        began = mark(device)
        drafts: list[Draft] = []
        if arm is not None:
            taken = next(offer for offer in offers if offer.arm is arm)
            drafts = lossless.drafter(taken).propose(text, count, self._draw())
        drafted = mark(device)
        ids = [text[-1], *(draft.id for draft in drafts)]
        rows, best = lossless.verifier.dense(ids, len(text) - 1, len(ids)), [None] * len(ids)
        if isinstance(lossless.verifier, VerifyStep):
            known, best = lossless.verifier.read()
            drafts = [draft._replace(id=id) for id, draft in zip(known[1:], drafts, strict=False)]
        found: list[Drawn] = []
        for logits, draft, told in zip(rows, [*drafts, None], best, strict=False):
            found.append(self.drawing(logits, 0.0, None, told, draft))
            id, sound, *_ = found[-1].wait()
            text.append(id)
            if draft is None or id != draft.id or id in self.stop or not sound:
                break
        stood = len(found) - 1
        draft_s, verify_s = seconds(began, drafted), seconds(drafted, mark(device))
        cost = lossless.controller.learn(arm, len(drafts), stood, draft_s, verify_s)
        for offer in offers:
            if offer.arm is not arm:
                offer.arm.fade()
        lossless.statistics.add(arm.name if drafts else "none", len(drafts), stood, cost)
        return found

    def _draw(self) -> Draw:
        """How a draft is drawn: as a token is, with what the drafts before it change."""
        sampling, fork = self.request.sampling, self.drawing.adjust.fork()
        if sampling.greedy and fork.idle:
            return likeliest

        def draw(logits: Tensor) -> Draft:
            logits = fork(logits)
            if sampling.greedy:
                token, chances = sampling.draw(logits, self.drawing.generator)[0], None
            else:
                token, chances = sampling.draw_known(logits, self.drawing.generator)
            fork.add(token)
            if fork.constraint is not None:
                fork.constraint.accept(int(token))
            return Draft(int(token), chances)

        return draw
