"""Looped models in transformers (trust_remote_code=True): the numbers and tokens of ours, with weights stored once."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_harness import needs, write_files, write_tokenizer
from test_model import ARCHS, close, last, tiny, tokens

import convert
from convert import load_any, to_hf, unroll
from evaluation import harness
from exits import decode
from lib.cli import UserError
from lib.export import LIB, standalone
from lib.log import write_log
from lib.tokenizer import Tokenizer
from model import RecursiveTransformer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

KINDS = {"tied": {"n_loop": 3}, "relaxed": {"n_loop": 2, "rank": 3},
         "per-loop": {"n_loop": 2, "rank": 3, "vectors": "per_loop"},
         "first-loop-kv": {"n_loop": 3, "rank": 3, "vectors": "per_loop", "kv": "first_loop"},
         "one-loop": {"n_loop": 1, "rank": 2}}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_arch = pytest.mark.parametrize("arch", ARCHS)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers copies a folder's code to, as a package, before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def both(folder, arch="llama", kind="relaxed", **changes):
    """(our model, the same in transformers); its matrices are large enough for a greedy text that does not repeat one
    token."""
    ours = tiny(arch, **KINDS[kind] | {"n_ctx": 128} | changes)
    for name, p in ours.layers.named_parameters():
        if p.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(p, std=0.6)
    to_hf(ours, folder)
    return ours, load(folder)


def greedy(ours, prompt, n) -> list[int]:
    return [token.item() for token, _ in decode(ours, prompt, n)]


def generate(theirs, idx, n, eos_token_id=99, **options):
    """The new tokens (B, n), which end with an id that no model here predicts."""
    return theirs.generate(idx, max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=eos_token_id,
                           **options)[:, idx.size(1):]


def padded(prompts):
    """(ids, mask) of prompts of several lengths, padded on the left with an id that is also a word."""
    T = max(len(p) for p in prompts)
    idx, mask = torch.full((len(prompts), T), 7), torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        idx[row, T - len(prompt):], mask[row, T - len(prompt):] = prompt, 1
    return idx, mask


PROMPTS = [tokens(12), tokens(20)[13:], tokens(30)[29:], tokens(40)[31:]]    # of 12, 7, 1 and 9 tokens


# ---------------------------------------------------------------------------------------------------------------------
# The same function

@each_arch
@each_kind
@torch.no_grad()
def test_logits_and_greedy_tokens_are_ours(arch, kind, tmp_path):
    ours, theirs = both(tmp_path / "hf", arch, kind)
    idx = tokens(2, 11)
    assert torch.equal(theirs(idx).logits, last(ours, idx))
    assert torch.equal(theirs(idx, use_cache=False).logits, last(ours, idx))
    close(theirs(idx, logits_to_keep=1).logits, last(ours, idx)[:, -1:])
    want = greedy(ours, idx[:1], 64)
    assert generate(theirs, idx[:1], 64)[0].tolist() == want and len(set(want)) > 5


@each_kind
def test_parameters_are_stored_and_loaded_once(kind, tmp_path):
    ours, theirs = both(tmp_path / "hf", "gemma", kind)
    file = load_file(tmp_path / "hf/model.safetensors")
    assert theirs.num_parameters() == ours.num_params()["stored"] == sum(w.numel() for w in file.values())
    assert len(theirs.model.layers) == ours.config.n_unique
    assert theirs.model.config.architecture() == ours.config.architecture()


@each_kind
@torch.no_grad()
def test_a_sequence_in_pieces(kind, tmp_path):
    """Chunks of several tokens and single ones, with a cache and a batch of which one sequence is padded."""
    ours, theirs = (model.double() for model in both(tmp_path / "hf", "llama", kind))
    idx, mask = padded([tokens(13), tokens(9)])
    pos = (mask.cumsum(-1) - 1).clamp(min=0)
    for padding, where in ((None, None), (mask, pos), (mask, None)):     # positions count from 0, or from the padding
        out, done, cache = [], 0, transformers.DynamicCache()
        for T in (5, 4, 1, 3):
            new = slice(done, done + T)
            done += T
            out.append(theirs(idx[:, new], None if padding is None else padding[:, :done],
                              None if where is None else where[:, new], past_key_values=cache).logits)
        assert torch.cat(out, 1).isfinite().all()                        # of padding too
        close(torch.cat(out, 1)[:1], last(ours, idx[:1]), 1e-4)          # norms and angles stay in fp32
        if padding is not None:
            close(torch.cat(out, 1)[1:, 4:], last(ours, idx[1:, 4:]), 1e-4)
    depths = ours.config.kv_loops * ours.config.n_unique
    assert [layer.get_seq_length() for layer in cache.layers] == [13] * depths == [13] * theirs.config.num_hidden_layers


def test_every_token_attends_to_something(tmp_path):
    """Padding to itself: some kernels return NaN for a softmax over nothing, which every later layer would spread."""
    ours, theirs = both(tmp_path / "hf")
    idx, padding = padded(PROMPTS)
    depths = sys.modules[type(theirs).__module__].DepthCache(ours.config, None, idx, None, padding)
    assert depths.make_mask(12).any(-1).all()


# ---------------------------------------------------------------------------------------------------------------------
# generate

@each_arch
@each_kind
def test_a_padded_batch_is_each_prompt_alone(arch, kind, tmp_path):
    ours, theirs = both(tmp_path / "hf", arch, kind)
    idx, mask = padded(PROMPTS)
    together = generate(theirs, idx, 24, attention_mask=mask)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert row.tolist() == greedy(ours, prompt[None], 24)


@pytest.mark.parametrize("kind", ["tied", "relaxed", "first-loop-kv"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False},
                                     {"prompt_lookup_num_tokens": 3}], ids=str)
def test_other_caches_and_assisted_decoding(kind, options, tmp_path):
    ours, theirs = both(tmp_path / "hf", "gemma", kind)
    assert generate(theirs, PROMPTS[0][None], 24, **options)[0].tolist() == greedy(ours, PROMPTS[0][None], 24)
    if "prompt_lookup_num_tokens" not in options:            # which takes one text at a time
        idx, mask = padded(PROMPTS)
        together = generate(theirs, idx, 24, attention_mask=mask, **options)
        for prompt, row in zip(PROMPTS, together, strict=True):
            assert row.tolist() == greedy(ours, prompt[None], 24)


@torch.no_grad()
def test_a_step_on_a_static_cache_is_one_graph(tmp_path):
    """As `generate` compiles it on a GPU."""
    ours, theirs = both(tmp_path / "hf", "gemma", "first-loop-kv")
    cache, idx = transformers.StaticCache(config=theirs.config, max_cache_len=16), tokens(1, 12)
    theirs(idx[:, :11], past_key_values=cache)
    step = torch.compile(theirs.forward, backend="eager", fullgraph=True)
    mask = (torch.arange(16) < 12)[None, None, None]
    close(step(idx[:, 11:], mask, torch.tensor([[11]]), past_key_values=cache).logits, last(ours, idx)[:, 11:], 1e-3)


@each_arch
@torch.no_grad()
def test_beams_and_positions_are_those_of_the_full_size_class(arch, tmp_path):
    """transformers' own class, on the unrolled model: a beam's cache is reordered at every depth."""
    ours, theirs = both(tmp_path / "hf", arch)
    to_hf(unroll(ours), tmp_path / "full")
    full = load(tmp_path / "full")
    idx, mask = padded(PROMPTS[:2])
    beams = [generate(model, idx, 20, attention_mask=mask, num_beams=4, num_return_sequences=3, eos_token_id=5)
             for model in (theirs, full)]
    assert torch.equal(*beams) and "NanoRRT" not in type(full).__name__
    idx, positions = tokens(2, 5), torch.tensor([[0, 1, 2, 3, 4], [0, 4, 5, 9, 30]])
    with_gaps = theirs(idx, position_ids=positions).logits
    close(with_gaps, full(idx, position_ids=positions).logits, 1e-3)
    assert (with_gaps - theirs(idx).logits).abs().amax((1, 2)).gt(0.1).tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Training, saving

@pytest.mark.parametrize("kind", ["relaxed", "first-loop-kv"])
def test_loss_and_gradients(kind, tmp_path):
    ours, theirs = both(tmp_path / "hf", "llama", kind)
    idx = tokens(2, 11)
    loss = torch.nn.functional.cross_entropy(ours.logits(ours(idx)[-1])[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    want = {f"model.{name}": p.grad for name, p in ours.named_parameters()}
    for checkpointing in (False, True):
        theirs.train().zero_grad()
        if checkpointing:
            getattr(theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable)()
        out = theirs(idx, labels=idx)
        out.loss.backward()
        close(out.loss, loss)
        assert theirs.model.checkpointing is checkpointing
        for name, p in theirs.named_parameters():
            close(p.grad, want[name])


@each_arch
def test_saved_and_loaded_again(arch, tmp_path):
    """save_pretrained copies the code along; half precision, and device_map, are options of from_pretrained."""
    ours, theirs = both(tmp_path / "hf", arch)
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    for file in ("model.py", "modeling_nanorrt.py"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    idx = tokens(2, 11)
    assert torch.equal(again(idx).logits, theirs(idx).logits)
    half = load(tmp_path / "again", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(idx).logits, last(ours.bfloat16(), idx))


@each_arch
def test_new_weights_are_as_our_constructors_make_them(arch, tmp_path):
    """Not as transformers would: it sets the weight of every norm to 1, which is 2 in Gemma."""
    ours, theirs = both(tmp_path / "hf", arch)
    new = transformers.AutoModelForCausalLM.from_config(theirs.config, trust_remote_code=True)
    fresh = RecursiveTransformer(ours.config)
    for (name, p), (_, q) in zip(new.model.layers.named_parameters(), fresh.layers.named_parameters(), strict=True):
        if q.std():
            assert 0.5 < p.std() / q.std() < 2, name
        else:
            assert torch.equal(p, q), name                               # a constant


@pytest.mark.parametrize("arch", ["llama", "gemma"])         # with a head, and tied
@torch.no_grad()
def test_more_tokens(arch, tmp_path):
    _, theirs = both(tmp_path / "hf", arch)
    idx = tokens(2, 11)
    before = theirs(idx).logits
    theirs.resize_token_embeddings(60)
    after = theirs(idx).logits
    assert after.shape == (2, 11, 60) and theirs.config.vocab_size == 60
    assert theirs.config.tie_word_embeddings is (arch == "gemma")        # what decides whether a head grows, too
    close(after[..., :53], before)
    theirs.save_pretrained(tmp_path / "more")
    close(load(tmp_path / "more")(idx).logits, after)


def test_peft_trains_a_lora_on_the_shared_weights(tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = both(tmp_path / "hf")
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_parameters=["attn.q.weight", "mlp.up.weight"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    model(tokens(2, 11), labels=tokens(2, 11)).loss.backward()
    assert len(trained) == 2 * 2 * ours.config.n_unique and any(p.grad.any() for p in trained)


# ---------------------------------------------------------------------------------------------------------------------
# The folder

def test_the_code_stands_alone(tmp_path):
    """The two files import nothing but each other, torch, transformers and the standard library."""
    both(tmp_path / "hf")
    assert (tmp_path / "hf/modeling_nanorrt.py").read_bytes() == (LIB / "modeling_nanorrt.py").read_bytes()
    for file in ("model.py", "modeling_nanorrt.py"):
        nodes = list(ast.walk(ast.parse((tmp_path / "hf" / file).read_text())))
        found = {node.level * "." + node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found = {name[:1] + name[1:].partition(".")[0] for name in found}
        assert found <= sys.stdlib_module_names | {"torch", "transformers", "safetensors", ".model"}
    ruff = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821,F811,E9",
                           tmp_path / "hf"], capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr               # no name is undefined


def test_the_code_goes_with_the_looped_model(tmp_path):
    """An unrolled model in its place needs none, and has none."""
    ours, _ = both(tmp_path / "hf")
    to_hf(unroll(ours), tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.py"))


def test_what_needs_our_other_files_is_left_out():
    """And nothing else: every other definition of model.py is copied as it is."""
    source = (LIB.parent / "model.py").read_text(encoding="utf-8")
    kinds = (ast.FunctionDef, ast.ClassDef)
    ours, copy = ({ast.unparse(node) for node in ast.parse(text).body if isinstance(node, kinds)}
                  for text in (source, standalone(source)))
    changed = {ast.parse(code).body[0].name for code in ours - copy}
    assert changed == {"Config", "RelaxedLinear", "row_kernels", "RecursiveTransformer", "read_config"}


PROGRAM = """
import sys
from transformers import pipeline
write = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(write(sys.argv[2], max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"], end="")
assert not {"lib", "model", "kernels"} & set(sys.modules)
"""


def test_a_pipeline_far_from_the_clone(home, tmp_path):
    """In a process that cannot import our files."""
    convert.main([f"--donor={home}/donor", f"--out={tmp_path}/looped", "--init=average", "--rank=4"])
    convert.main([f"--donor={tmp_path}/looped", f"--out={tmp_path}/hf", "--hf"])
    ours, tokenizer = load_any(tmp_path / "looped"), Tokenizer.load(tmp_path / "looped")
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "hf", "The cat sees"], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ | {
                              "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ids = greedy(ours, torch.tensor([tokenizer.encode("The cat sees")]), 12)
    assert done.stdout == tokenizer.decode(ids) != ""


@needs
def test_a_task_of_the_harness(tmp_path):
    """lm-evaluation-harness' own model on the folder, and our adapter on the checkpoint."""
    from lm_eval.models.huggingface import HFLM
    ours, _ = both(tmp_path / "hf", "llama", vocab_size=304)
    ours.save(tmp_path / "ours")
    for folder in ("ours", "hf"):
        write_tokenizer(tmp_path / folder, bos=False)
    theirs = HFLM(str(tmp_path / "hf"), trust_remote_code=True, dtype="float32", device="cpu", batch_size=4)
    lm = harness.HarnessLM(ours, Tokenizer.load(tmp_path / "ours", 304), batch=4)
    for name, task in harness.load_tasks(["arc_easy"], str(write_files(tmp_path / "files", 0))).items():
        rows, answers = zip(*(harness.run_task(one, task, 3) for one in (lm, theirs)), strict=True)
        assert rows[0]["acc"] == rows[1]["acc"] and len(answers[0]) == 6, name
        assert harness.compare(*answers)["largest_difference"] < 1e-4


def test_the_command_and_its_card(home, tmp_path, capsys):
    convert.main([f"--donor={home}/donor", f"--out={tmp_path}/looped", "--init=average", "--rank=4"])
    write_log(tmp_path / "looped", step=0, full_val_loss=3.5, donor_loss=2.25)
    write_log(tmp_path / "looped", step=9, full_val_loss=2.875, final=True)
    edited = json.loads((tmp_path / "looped/config.json").read_text())
    edited["extra"] |= {"_name_or_path": "acme/tiny", "pad_token_id": 3}
    (tmp_path / "looped/config.json").write_text(json.dumps(edited))
    convert.main([f"--donor={tmp_path}/looped", f"--out={tmp_path}/hf", "--hf", "--dtype=bfloat16"])
    ours = RecursiveTransformer.load(tmp_path / "looped")
    n = ours.num_params()
    assert f"{n['stored']:,} parameters stored" in capsys.readouterr().out
    card = (tmp_path / "hf/README.md").read_text()
    share = n["stored_block"] / unroll(ours).num_params()["stored_block"]
    for text in ("\nbase_model: acme/tiny\n", "# A Relaxed Recursive Transformer of 2 loops and LoRA rank 4, made from",
                 "a block of 2 layers that runs 2 times", f"stores {share:.1%} of", "| donor | 2.2500 |",
                 "| before training | 3.5000 |\n| after training | 2.8750 |", "trust_remote_code=True"):
        assert text in card, text
    theirs = load(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16 and theirs.config.pad_token_id == 3
    assert {path.name for path in (tmp_path / "hf").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


def test_a_looped_export_is_no_donor(home, tmp_path):
    to_hf(tiny("llama", n_loop=2), tmp_path / "hf")
    with pytest.raises(UserError, match="looped export to transformers by convert.py --hf: give the checkpoint"):
        load_any(tmp_path / "hf")
    with pytest.raises(UserError, match="--rank=3 has no effect, since --hf only exports"):
        convert.main([f"--donor={tmp_path}/hf", f"--out={tmp_path}/out", "--hf", "--rank=3"])
    with pytest.raises(UserError, match="--hf=True has no effect, since --unroll only exports"):
        convert.main([f"--donor={tmp_path}/hf", f"--out={tmp_path}/out", "--hf", "--unroll"])
