"""Losses at the exits: in chunks they equal those written out with whole logits, and take little memory."""

import itertools
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import IGNORE, chunked_loss, distill_loss, exit_weights

KINDS = ["fkl", "rkl", "jsd", "tvd"]
V, C = 23, 6
exactly = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)


def written_out(states, head, targets, weights=(1.0,), teacher=None, kind="fkl", distill_weight=1.0, temperature=1.0,
                self_distill=False):
    """`chunked_loss` with whole logits, for autograd."""
    targets = targets.flatten()
    kept, total, ces = targets != IGNORE, 0.0, []
    count = kept.sum().clamp(min=1)
    logits = [x.flatten(0, -2) @ head.t() for x in states]
    from_teacher = teacher and (teacher[0].flatten(0, -2) @ teacher[1].t()).detach()
    for z, weight in zip(logits, weights, strict=True):
        ces.append(F.cross_entropy(z, targets, ignore_index=IGNORE, reduction="sum") / count)
        total = total + weight * ces[-1]
        t = logits[-1].detach() if self_distill and z is not logits[-1] else from_teacher
        if t is not None and kept.any():
            apart = distill_loss(z[kept] / temperature, t[kept] / temperature, kind)
            total = total + weight * distill_weight * temperature**2 * apart
    return total, torch.stack(ces).detach()


def draw(n_exits=1, shape=(12,), seed=0, dtype=torch.float64, ignored=0):
    """(states, head, targets, weights) and a teacher of another width; the first `ignored` targets do not count."""
    torch.manual_seed(seed)
    states = [torch.randn(*shape, C, dtype=dtype, requires_grad=True) for _ in range(n_exits)]
    head = torch.randn(V, C, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, shape)
    targets.view(-1)[:ignored] = IGNORE
    teacher = torch.randn(*shape, C + 3, dtype=dtype), torch.randn(V, C + 3, dtype=dtype)
    return (states, head, targets, (0.3, 0.5, 1.7)[:n_exits]), teacher


def gradients(loss, states, head):
    return torch.autograd.grad(loss, [x for x in (head, *states) if x.requires_grad])


def assert_as_written_out(given, chunk=None, **options):
    (want, want_ce), (loss, ce) = written_out(*given, **options), chunked_loss(*given, chunk=chunk, **options)
    exactly(loss, want)
    exactly(ce, want_ce)
    assert not ce.requires_grad
    for a, b in zip(gradients(loss, *given[:2]), gradients(want, *given[:2]), strict=True):
        exactly(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients

def test_exit_weights():
    assert exit_weights(3, "weighted") == pytest.approx((1 / 6, 2 / 6, 3 / 6))
    assert exit_weights(3, "aggressive", 0.2) == (0.2, 0.2, 1.0)
    assert exit_weights(1, "weighted") == exit_weights(1, "aggressive") == (1.0,)
    with pytest.raises(ValueError, match="unknown exit loss 'last': use weighted or aggressive"):
        exit_weights(2, "last")


def reference_divergence(s: list[float], t: list[float], kind: str) -> float:
    """One token's divergence of student p from teacher q, entry by entry."""
    p, q = ([math.exp(x) / sum(math.exp(y) for y in logits) for x in logits] for logits in (s, t))
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += {"fkl": b * math.log(b / a), "rkl": a * math.log(a / b), "tvd": abs(a - b) / 2,
                  "jsd": (a * math.log(a / m) + b * math.log(b / m)) / 2}[kind]
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_distill_loss_is_the_divergence_written_out(kind):
    torch.manual_seed(1)
    s, t = (3 * torch.randn(2, 3, 11, dtype=torch.float64) for _ in "st")
    want = [reference_divergence(a, b, kind) for a, b in
            zip(s.flatten(0, 1).tolist(), t.flatten(0, 1).tolist(), strict=True)]
    assert distill_loss(s, t, kind).item() == pytest.approx(sum(want) / 6, rel=1e-12)
    assert distill_loss(s.float(), t.float(), kind).item() == pytest.approx(sum(want) / 6, rel=1e-5)
    assert distill_loss(s, s + 5, kind).item() == pytest.approx(0, abs=1e-12)  # a shift is no difference
    with pytest.raises(ValueError, match="unknown distillation 'kl'"):
        distill_loss(s, t, "kl")


@pytest.mark.parametrize("n_exits", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_loss_written_out(kind, n_exits):
    """Chunks that divide the 12 tokens, that do not, that hold more; some targets ignored; every kind of teacher."""
    grid = itertools.product((1.0, 2.0), (False, True), (False, True), (4, 5, 100, None), (0, 7))
    for temperature, taught, self_distill, chunk, ignored in grid:
        given, teacher = draw(n_exits, ignored=ignored, seed=n_exits)
        assert_as_written_out(given, chunk, teacher=teacher if taught else None, kind=kind, distill_weight=0.7,
                              temperature=temperature, self_distill=self_distill)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, ignored", [((1,), 0), ((1,), 1), ((5,), 5), ((2, 3), 4), ((2, 3), 6)])
def test_few_tokens_or_none(kind, shape, ignored):
    given, teacher = draw(2, shape, ignored=ignored)
    assert_as_written_out(given, 2, teacher=teacher, kind=kind)
    if ignored == math.prod(shape):
        loss, ce = chunked_loss(*given, teacher=teacher, kind=kind)
        assert loss.item() == 0 and not ce.any() and not any(g.any() for g in gradients(loss, *given[:2]))


@pytest.mark.parametrize("frozen", [0, 1, 2, "all but the first"])
def test_what_needs_no_gradient_gets_none(frozen):
    given, teacher = draw(2)
    tensors = [given[1], *given[0]]                              # the head, then the states
    for i, x in enumerate(tensors):
        x.requires_grad_(i == 0 if frozen == "all but the first" else i != frozen)
    assert_as_written_out(given, 5, teacher=teacher)
    chunked_loss(*given, teacher=teacher)[0].backward()
    assert [x.grad is not None for x in tensors] == [x.requires_grad for x in tensors]


def test_states_that_are_not_contiguous():
    (states, head, targets, weights), teacher = draw(2, (3, 4))
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in states]
    assert not turned[0].is_contiguous()
    spread = [torch.randn(3, 1, C, dtype=torch.float64, requires_grad=True) for _ in states]
    for xs in (turned, [x.expand(3, 4, C) for x in spread]):
        loss, want = (f(xs, head, targets, weights, teacher=teacher)[0]
                      for f in (chunked_loss, written_out))
        leaves = [head, *(turned if xs is turned else spread)]
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
            exactly(a, b)


def test_the_gradient_is_scaled_by_what_comes_after():
    given, teacher = draw(2)
    loss, want = chunked_loss(*given, teacher=teacher)[0], written_out(*given, teacher=teacher)[0]
    for a, b in zip(gradients(loss**2 / 3, *given[:2]), gradients(want**2 / 3, *given[:2]), strict=True):
        exactly(a, b)


def test_lengths_that_do_not_fit_are_refused():
    (states, head, targets, weights), (x, w) = draw(2)
    with pytest.raises(ValueError, match="2 exits but 1 weights"):
        chunked_loss(states, head, targets)
    with pytest.raises(AssertionError, match=r"11 targets for \[12, 12\] hidden states"):
        chunked_loss(states, head, targets[:-1], weights)
    with pytest.raises(AssertionError, match=r"12 targets for \[12, 12, 1\] hidden states"):
        chunked_loss(states, head, targets, weights, teacher=(x[:1], w))
    with pytest.raises(ValueError, match="unknown distillation 'kl': use fkl, rkl, jsd or tvd"):
        chunked_loss(states, head, targets, weights, teacher=(x, w), kind="kl")


# ---------------------------------------------------------------------------------------------------------------------
# Where gradients go, and in which precision

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [V + 5, V - 4])
def test_a_teacher_whose_vocabulary_is_padded_differently(kind, rows):
    """The divergence is over the ids that both have: further ones of the teacher are left out of its softmax, and what
    only the student has is never predicted by it."""
    given, (hidden, head) = draw(2)
    head = torch.cat([head, torch.randn(5, C + 3, dtype=head.dtype)])[:rows]
    t = F.log_softmax(hidden @ head[:V].t(), -1)
    t = F.pad(t, (0, V - t.shape[-1]), value=-100.0)
    want, _ = written_out(*given, teacher=(t, torch.eye(V, dtype=t.dtype)), kind=kind)
    loss, _ = chunked_loss(*given, teacher=(hidden, head), kind=kind, chunk=5)
    exactly(loss, want)
    exactly(gradients(loss, *given[:2]), gradients(want, *given[:2]))


def test_a_teacher_gets_no_gradient():
    given, teacher = draw()
    teacher = [x.requires_grad_() for x in teacher]
    chunked_loss(*given, teacher=teacher)[0].backward()
    assert [x.grad for x in teacher] == [None, None] and given[1].grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_exits_send_no_gradient_into_the_one_they_learn_from(kind):
    (states, head, targets, weights), _ = draw(3)
    together, _ = chunked_loss(states, head, targets, weights, kind=kind, self_distill=True, chunk=5)
    alone, _ = chunked_loss(states[-1:], head, targets, weights[-1:])
    exactly(torch.autograd.grad(together, states[-1]), torch.autograd.grad(alone, states[-1]))


def test_a_second_backward_is_refused():
    given, _ = draw()
    loss, _ = chunked_loss(*given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="chunked_loss keeps its gradients for one backward only"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_gradients_are_near_and_have_their_inputs_dtype(dtype):
    """Of fp32 tensors under autocast, and of bf16 ones."""
    (states, head, targets, weights), teacher = draw(2, (64,), dtype=torch.float32)
    want = gradients(chunked_loss(states, head, targets, weights, teacher=teacher)[0], states, head)
    states, head = [x.detach().to(dtype).requires_grad_() for x in states], head.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        loss, ce = chunked_loss(states, head, targets, weights, teacher=teacher, chunk=16)
    assert loss.dtype == ce.dtype == torch.float32
    logits = [F.linear(x.bfloat16(), head.bfloat16()).float() for x in states]  # rounded here, and nowhere after
    torch.testing.assert_close(ce, torch.stack([F.cross_entropy(z, targets) for z in logits]).detach())
    for a, b in zip(gradients(loss, states, head), want, strict=True):
        assert a.dtype == dtype
        assert 1e-4 < (a.float() - b).norm() / b.norm() < 2e-2   # rounded, but no more than that


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_gradient_is_summed_in_fp32(dtype):
    """512 chunks that each add the same: in bf16 the sum would stop growing at 256 of them."""
    torch.manual_seed(0)
    x, head = torch.randn(C).to(dtype).expand(512, C), torch.randn(V, C).to(dtype).requires_grad_()
    targets = torch.full((512,), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        by_head, = torch.autograd.grad(chunked_loss([x], head, targets, chunk=1)[0], head)
    want, = torch.autograd.grad(written_out([x.float()], head.float(), targets)[0], head)
    assert (by_head.float() - want.float()).norm() / want.float().norm() < 2e-2


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_chunks_are_the_same():
    given, teacher = draw(2, (14,), dtype=torch.float32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = [chunked_loss(*given, teacher=teacher, kind="jsd", distill_weight=0.5, temperature=2.0, self_distill=True,
                           compiled=compiled, chunk=4)[0] for compiled in (False, True)]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0      # compiled it was, though inside a loop that is not
    torch.testing.assert_close(losses[1], losses[0])
    for a, b in zip(*(gradients(loss, *given[:2]) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make while it is on: `now`, and at the `peak`. `given` are not counted."""

    def __init__(self, given):
        super().__init__()
        self.given = {StorageWeakRef(x.untyped_storage()) for x in given}
        self.bytes, self.peak = {}, 0

    @property
    def now(self) -> int:
        self.bytes = {ref: n for ref, n in self.bytes.items() if not ref.expired()}
        return sum(self.bytes.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (ref := StorageWeakRef(x.untyped_storage())) not in self.given:
                self.bytes[ref] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now)
        return out


def measure(loss, n, vocab_size, width=4, kind=None, train_head=True, **options) -> Live:
    """Memory of `loss` and its backward for n tokens; `kind` distils, from a teacher as wide as the student."""
    torch.manual_seed(0)
    states, head = torch.randn(n, width, requires_grad=True), torch.randn(vocab_size, width, requires_grad=train_head)
    targets, teacher = torch.randint(vocab_size, (n,)), (torch.randn(n, width), torch.randn(vocab_size, width))
    if kind:
        options |= {"teacher": teacher, "kind": kind}
    with Live([states, head, targets, *teacher]) as live:
        total, _ = loss([states], head, targets, **options)
        if total.requires_grad:
            total.backward()
    return live


@pytest.mark.parametrize("kind", [None, "fkl", "jsd"])
def test_chunks_take_a_twentieth_of_the_memory(kind):
    naive = measure(written_out, 512, 16_384, kind=kind)
    chunked = measure(chunked_loss, 512, 16_384, kind=kind, chunk=32)
    assert naive.peak > 3 * 512 * 16_384 * 4                     # the counter does see whole logits
    assert chunked.peak <= naive.peak / 20, (chunked.peak, naive.peak)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_memory_does_not_grow_with_the_logits(kind):
    few, many = (measure(chunked_loss, n, 4096, kind=kind, chunk=32).peak for n in (128, 1024))
    assert many - few < 896 * 4096 * 4 / 100


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_by_default_what_is_temporary_is_less_than_half_the_logits(kind):
    assert measure(chunked_loss, 8192, 128, kind=kind).peak < 8192 * 128 * 4 / 2


def test_without_grad_the_values_are_the_same_and_no_gradient_is_made():
    given, teacher = draw(2)
    want = chunked_loss(*given, teacher=teacher, self_distill=True)
    with torch.no_grad():
        loss, ce = chunked_loss(*given, teacher=teacher, self_distill=True)
        live = measure(chunked_loss, 8, 512, width=512, chunk=2)
    assert loss.item() == want[0].item() and torch.equal(ce, want[1]) and not loss.requires_grad
    assert live.peak < 512 * 512 * 4 / 10                        # the head's gradient would be ten times this


def test_a_frozen_heads_gradient_is_not_made():
    peaks = [measure(chunked_loss, 8, 512, width=512, chunk=2, train_head=trained).peak for trained in (True, False)]
    assert peaks[1] < 512 * 512 * 4 / 10 < peaks[0]
