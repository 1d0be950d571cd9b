"""model.py: the network against an independent one, and Meta's folders."""
import json
import math
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from conftest import ROOT, random_model
from model import (InputError, ModelArgs, Transformer, default_exits, find_checkpoint, lite_loss, load_meta, read_args,
                   rope_table, save_meta)
from reference import Llama

SPLIT = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}     # Meta's


def write_folder(folder, model, shards=1, **params):
    """A Meta folder written by the tests' own hand, split over model-parallel shards as Meta's column/row layers are."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {k: v for k, v in asdict(model.args).items() if v is not None and k != "max_seq_len"}
    (folder / "params.json").write_text(json.dumps({**own, "vocab_size": -1, **params}))
    for r in range(shards):
        state = {"rope.freqs": torch.rand(4)}
        for key, w in model.state_dict().items():
            axis = SPLIT.get(key.split(".")[-2])
            state[key] = w if axis is None else w.chunk(shards, axis)[r].clone()
        torch.save(state, folder / f"consolidated.{r:02d}.pth")
    return folder


@pytest.mark.parametrize("change", [{}, dict(n_kv_heads=None), dict(n_kv_heads=1, rope_theta=100.0, norm_eps=1e-3),
                                    dict(ffn_dim_multiplier=1.3, multiple_of=32)])
def test_logits_equal_an_independent_implementation(change):
    model = random_model(**change)
    tokens = torch.randint(96, (40,))
    want = Llama.of(model).logits(tokens.tolist())
    got = model(tokens[None])[0].detach().numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_feed_forward_widths_are_metas():
    assert ModelArgs(4096, 32, 32).ffn_dim == 11008                                                         # 7B
    assert ModelArgs(5120, 40, 40).ffn_dim == 13824                                                         # 13B
    assert ModelArgs(8192, 80, 64, multiple_of=4096, ffn_dim_multiplier=1.3).ffn_dim == 28672               # 70B
    assert ModelArgs(100, 2, 2, multiple_of=1, ffn_dim_multiplier=1.3).ffn_dim == 345                       # int(1.3 * int(800 / 3)): 346 would be in one go


def test_null_in_params_json_is_a_value_left_out(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 48, "n_layers": 6, "n_heads": 6, "n_kv_heads": null, "ffn_dim_multiplier": null, "vocab_size": -1}')
    assert read_args(tmp_path) == ModelArgs(48, 6, 6)


def test_first_weights_have_the_variances_that_init_weights_names():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=128, n_layers=8, n_heads=4, vocab_size=512)).init_weights()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()                        # norms scale nothing yet
        else:                                            # into the residual: 1 / (2 L D); 16 384 draws and more, so 8 % are seven standard errors
            var = 1 / 2048 if name.split(".")[-2] in ("wo", "w2") else 1 / 128
            assert p.var().item() == pytest.approx(var, rel=0.08) and abs(p.mean().item()) < 0.05 * var ** 0.5, name


def test_parameter_counts_of_7b_and_13b():
    with torch.device("meta"):
        count = [sum(p.numel() for p in Transformer(ModelArgs(*a, vocab_size=32000)).parameters())
                 for a in ((4096, 32, 32), (5120, 40, 40))]
    assert count == [6738415616, 13015864320]


def test_a_model_that_has_decoded_can_be_trained():
    rope_table.cache_clear()                             # or an earlier test's table serves
    model, tokens = random_model(), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        model(tokens)
    model(tokens, tokens).sum().backward()               # would refuse what was made in inference mode
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0


def test_rope_tables_stay_fp32_in_a_bf16_model():
    model = random_model(dtype=torch.bfloat16)
    x = torch.randn(1, 60, 6, 8).bfloat16()
    exact = random_model().layers[0].attention.rotate(x.float(), 0)
    got = model.layers[0].attention.rotate(x, 0)
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())       # one rounding, at the end


def test_cached_pieces_equal_the_uncached_forward():
    model, tokens = random_model(dtype=torch.float64), torch.randint(96, (2, 30))
    cache, pos, got = model.new_cache(2, 30).fill_(float("nan")), 0, []
    for size in (7, 1, 1, 12, 9):                        # a prompt, single tokens, several rows on top of a past
        *_, h = model.states(tokens[:, pos:pos + size], pos=pos, cache=cache)
        got.append(model.logits(h))
        pos += size
    torch.testing.assert_close(torch.cat(got, 1), model(tokens), rtol=1e-9, atol=1e-9)


def test_exit_n_is_the_state_after_n_blocks_and_exit_L_the_ordinary_logits():
    model, tokens = random_model(dtype=torch.float64), torch.randint(96, (1, 9))
    reference = Llama.of(model)
    want = [reference.states(t, pos) for pos, t in enumerate(tokens[0].tolist())]
    states = list(model.states(tokens, exits=[2, 3]))
    assert len(states) == 3
    for n, h in zip((2, 3, 6), states):
        np.testing.assert_allclose(h[0].detach(), np.stack([s[n - 1] for s in want]), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.logits(states[-1]), model(tokens))
    assert len(list(model.states(tokens, exits=[2, 6]))) == 2            # the last layer is no exit: it comes once


def test_default_exits():
    assert default_exits(32) == [8, 12, 16, 20, 24, 28] and default_exits(40) == [8, 12, 16, 20, 24, 28, 32, 36]
    assert default_exits(8) == [2, 4, 6] and default_exits(15) == [2, 4, 6, 8, 10, 12, 14] and default_exits(2) == []


def test_losses_are_sums_over_labelled_positions_in_closed_form():
    model, tokens = random_model(dtype=torch.float64), torch.randint(96, (3, 12))
    labels = torch.randint(96, (3, 12))
    labels[0, :5] = labels[1, 7:] = labels[2] = -100
    want = []
    for h in model.states(tokens, [2, 4]):
        logp, total = model.logits(h).log_softmax(-1), 0
        for b in range(3):
            for t in range(12):
                if labels[b, t] != -100:
                    total -= logp[b, t, labels[b, t]].item()
        want.append(total)
    got = model(tokens, labels, [2, 4])
    np.testing.assert_allclose(got.detach(), want, rtol=1e-12)
    weights = [3.0, 0.5, 1.5]
    assert lite_loss(got, weights).item() == pytest.approx(sum(w * x for w, x in zip(weights, want)) / 5.0, rel=1e-12)
    plain = model(tokens, labels)
    ce = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    assert lite_loss(plain, [1.0]).item() == pytest.approx(ce.item(), rel=1e-12)       # no exits: plain tuning


@pytest.mark.parametrize("choices", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("copies", [False, True])
def test_losses_of_a_teacher_and_their_gradients_in_closed_form(monkeypatch, copies, choices):
    """What is learnt are constants: the teacher's probabilities, at full depth on its own, exact K and V; as far as
    choices goes, by the exits the likeliest token of the model's own last layer."""
    monkeypatch.setattr("model.LOGIT_ROWS", 5)
    model, tokens, labels = random_model(dtype=torch.float64), torch.randint(96, (3, 12)), torch.randint(96, (3, 12))
    teacher = random_model(seed=1, dtype=torch.float64, n_layers=2).requires_grad_(False)
    labels[0, :5] = labels[1, 7:] = -100
    leave, keep = torch.full((3, 12), math.inf), labels != -100
    leave[:, 4:9:2], leave[0, 5] = 2, 4
    leave = leave if copies else None
    p = teacher(tokens).softmax(-1)[keep]
    logp = [model.logits(h)[keep].log_softmax(-1) for h in model.states(tokens, [2, 4], leave=leave)]
    want = [-(p * x).sum() for x in logp]
    if choices:
        likeliest = [row.index(max(row)) for row in logp[-1].tolist()]
        want[:2] = [(1 - choices) * loss - choices * sum(x[i, token] for i, token in enumerate(likeliest)) for loss, x in zip(want, logp[:2])]
    want = torch.stack(want)
    got, grads = model(tokens, labels, [2, 4], leave, teacher, choices), []
    np.testing.assert_allclose(got.detach(), want.detach(), rtol=1e-12)
    for losses in (got, want):
        grads.append(torch.autograd.grad(lite_loss(losses, [1, 2, 5]), list(model.parameters())))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_exits_learn_choices_and_the_last_layer_labels():
    model, tokens, labels = random_model(dtype=torch.float64), torch.randint(96, (3, 12)), torch.randint(96, (3, 12))
    labels[:, :4] = -100
    plain, half, chosen = (model(tokens, labels, [2, 4], choices=part) for part in (0, 0.5, 1))
    said = model(tokens).argmax(-1)
    assert (said != labels)[labels != -100].any() and plain[-1] == chosen[-1]
    torch.testing.assert_close(half, (plain + chosen) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(chosen[:2], model(tokens, torch.where(labels == -100, -100, said), [2, 4])[:2], rtol=1e-12, atol=0)


def test_an_unlabelled_batch_weighs_nothing_and_is_not_nan():
    model, tokens = random_model(), torch.randint(96, (2, 5))
    losses = model(tokens, torch.full_like(tokens, -100), [2])
    lite_loss(losses, [1, 1]).backward()
    assert losses.tolist() == [0, 0]
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters())


def test_only_one_exits_logits_are_kept_for_the_backward_pass():
    model, tokens = random_model(), torch.randint(96, (4, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(tokens, tokens, [2, 4])
    assert kept and not any(shape[-1:] == (96,) and shape[0] == 4 * 32 for shape in kept)


def test_activation_checkpointing_changes_no_gradient():
    model, tokens = random_model(dtype=torch.float64), torch.randint(96, (2, 16))
    leave = torch.full((2, 16), math.inf)
    leave[:, 4:9] = 2
    teacher = random_model(n_layers=2, dtype=torch.float64).requires_grad_(False)
    for how in ((None, None), (leave, teacher), (leave, None, 0.5)):
        grads = []
        for model.checkpoint_blocks in (False, True):
            model.zero_grad()
            lite_loss(model(tokens, tokens, [2, 4], *how), [1, 2, 3]).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_model_parallel_shards_merge_to_the_same_weights(tmp_path, shards):
    model = random_model(dim=64, n_heads=8, n_kv_heads=8)
    loaded = load_meta(write_folder(tmp_path, model, shards))
    assert loaded.args.vocab_size == 96
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_tensors_that_were_saved_as_one_train_as_two(tmp_path):
    """Folders of models with tied embeddings: both parameters on one memory would be stepped twice."""
    write_folder(tmp_path, random_model())
    state = torch.load(tmp_path / "consolidated.00.pth")
    torch.save(state | {"output.weight": state["tok_embeddings.weight"]}, tmp_path / "consolidated.00.pth")
    loaded = load_meta(tmp_path)
    assert torch.equal(loaded.output.weight, loaded.tok_embeddings.weight)
    assert len({p.data_ptr() for p in loaded.parameters()}) == len([*loaded.parameters()])


def test_saved_folders_are_metas_and_load_again(tmp_path, tokenizer):
    model = random_model(vocab_size=tokenizer.size)
    save_meta(tmp_path, model, tokenizer, dict(exits=[2, 4], weights=[1.0, 1.0, 1.0]))
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    assert state.keys() == model.state_dict().keys() and {w.dtype for w in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "params.json").read_text()) == dict(
        dim=48, n_layers=6, n_heads=6, n_kv_heads=2, vocab_size=tokenizer.size, multiple_of=16, norm_eps=1e-5, rope_theta=10000.0)
    assert json.loads((tmp_path / "lite.json").read_text()) == dict(max_seq_len=64, exits=[2, 4], weights=[1.0, 1.0, 1.0])
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.model_bytes
    again = load_meta(tmp_path)
    assert again.args.max_seq_len == 64
    assert all(torch.equal(w.bfloat16(), again.state_dict()[k]) for k, w in model.state_dict().items())


def test_context_is_4096_unless_the_folder_says_otherwise(tmp_path):
    write_folder(tmp_path, random_model())
    assert read_args(tmp_path).max_seq_len == 4096
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | dict(max_seq_len=88)))
    assert read_args(tmp_path).max_seq_len == 88                     # or params.json does, as some converters write it
    (tmp_path / "lite.json").write_text('{"max_seq_len": 77}')
    assert read_args(tmp_path).max_seq_len == 77


def test_an_output_folder_stands_for_its_latest_save(tmp_path):
    write_folder(tmp_path / "step-3", random_model())
    (tmp_path / "latest").symlink_to("step-3")
    assert find_checkpoint(tmp_path).resolve() == (tmp_path / "step-3").resolve()
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="no params.json") as e:
        find_checkpoint(tmp_path / "notes")
    assert "Hugging Face folder" not in str(e.value)     # only where there is a config.json


@pytest.mark.parametrize("shards, most", [(1, 1.1), (4, 2.1)])
def test_loading_needs_no_second_copy(tmp_path, shards, most):
    model = random_model(dim=1024, n_heads=8, n_kv_heads=8, n_layers=16, vocab_size=8192, multiple_of=256).bfloat16()
    size = sum(p.numel() * 2 for p in model.parameters())
    write_folder(tmp_path, model, shards)
    code = (f"import sys, torch, resource; sys.path.insert(0, {str(ROOT)!r}); import model, pathlib\n"
            "peak = lambda: int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024\n"
            f"before = peak(); m = model.load_meta({str(tmp_path)!r})\n"
            "total = sum(p.double().sum().item() for p in m.parameters() if p.dim() == 1) + sum("
            "w.view(torch.int16).flatten()[::1024].sum().item() for w in m.parameters())\n"            # touch every page
            "print(peak() - before)")
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.9 * size < grown <= most * size


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_fused_and_packed_matrices_give_the_same_states(dtype, tolerance, monkeypatch):
    """For 1 row (as decoding has), a few and many; the parameters keep names and values, in float64 (never packed) as views."""
    monkeypatch.setattr("model.PACK_FROM", 0)
    plain, fused = random_model(dtype=dtype), random_model(dtype=dtype).fuse()
    assert all(torch.equal(w, fused.state_dict()[name]) for name, w in plain.state_dict().items())
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for T in (1, 3, 40):
        tokens = torch.randint(96, (1, T), generator=torch.Generator().manual_seed(T))
        with torch.inference_mode():
            want, got = plain(tokens), fused(tokens)
        assert (want - got).abs().max() <= tolerance * want.abs().max()
    assert not any(p.requires_grad for p in fused.parameters())          # training them would not reach what is read
    attention = fused.layers[0].attention
    if dtype == torch.float64:
        assert attention.joint.data_ptr() == attention.wk.weight.data_ptr()      # one copy, not two
    elif torch.backends.mkldnn.is_available():
        assert attention.joint.is_mkldnn and fused.output.packed.is_mkldnn


def test_some_rows_of_the_head_are_these_rows_logits():
    model = random_model(dtype=torch.float64)
    h, rows = torch.randn(2, 48, dtype=torch.float64), [5, 90, 7]
    torch.testing.assert_close(model.logits(h, model.output.weight[rows]), model.logits(h)[:, rows])


def test_weights_that_do_not_fit_name_the_keys(tmp_path):
    model = random_model()
    folder = write_folder(tmp_path / "a", model, n_layers=5)
    with pytest.raises(InputError, match="layers.5.attention.wk.weight unexpected"):
        load_meta(folder)
    with pytest.raises(InputError, match=r"layers.6.*missing"):
        load_meta(write_folder(tmp_path / "b", model, n_layers=7))
    with pytest.raises(InputError, match=r"feed_forward.w1.weight is \(128, 48\), params.json says \(160, 48\)"):
        load_meta(write_folder(tmp_path / "c", model, multiple_of=80))
