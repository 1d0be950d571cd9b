"""LLaMA-2 in one file, with the two things LITE adds to it.

The names are Meta's, so Meta's checkpoints load without a translation table.  LITE changes nothing in the
network: its intermediate layers share the last layer's norm and output matrix (`logits`).  What it adds:

- training: `forward(tokens, labels, exits)` gives one cross-entropy per exit and one for the last layer;
- decoding: a block that comes after tokens which skipped it makes their K and V, too (`debt`, see `Block`).

"Exit n" is the state after n blocks, everywhere.  Dimensions, in all five files:
    B batch   T new positions   S positions in the cache   D model   H heads   K key/value heads
    E head width   V vocabulary   L layers   X exits, without the last layer   N rows, of whatever kind
"""
import json, math, pickle
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100                          # a label that carries no loss: prompts and pads
PACK_FROM = 2 ** 17                    # weights; smaller matrices lie in the CPU's cache anyway
LOGIT_ROWS = 512                       # positions whose logits, V numbers each, exist at a time in training
torch.backends.cuda.enable_cudnn_sdp(False)        # cuDNN's attention plans anew, 0.1 s, for each length

class InputError(Exception):
    """Something the user gave cannot be used; the message is one line: found, expected, what to do."""

@dataclass
class ModelArgs:
    """The keys of Meta's params.json, and the context length (which Meta leaves to the caller)."""
    dim: int                             # 7B: 4096, 32 layers, 32 heads; 13B: 5120, 40, 40
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None        # None: as many as n_heads (7B, 13B); fewer: grouped-query attention
    vocab_size: int = -1                 # -1, as in Meta's files: take it from the weights
    multiple_of: int = 256               # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096              # positions; lite.json may say otherwise

    @property
    def ffn_dim(self):
        """Width of SwiGLU: 2/3 of 4 D (it has three matrices instead of two), scaled, then rounded up."""
        width = int((self.ffn_dim_multiplier or 1) * int(8 * self.dim / 3))
        return self.multiple_of * math.ceil(width / self.multiple_of)

def default_exits(n_layers):
    """The exits known of LITE's 7B, every 4th layer from the 8th, for all; every 2nd in a small model."""
    return list(range(8, n_layers, 4)) if n_layers >= 16 else list(range(2, n_layers, 2))

def check_exits(exits, n_layers, name="--exits"):
    """The exits; InputError unless they ascend, below the last layer: thresholds follow their order."""
    if sorted(set(exits)) != exits or not all(0 < n < n_layers for n in exits):
        raise InputError(f"{name} {exits}: expected different layers from 1 to {n_layers - 1}, ascending")
    return exits

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in fp32 or better, then as Meta does in x's dtype, * weight."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight

class Linear(nn.Linear):
    """nn.Linear without first values: every weight here is loaded, or drawn by init_weights."""
    packed = None                        # the weight once more, as `pack` lays it out for decoding
    reset_parameters = lambda self: None

    def forward(self, x):
        return product(x, self.weight if self.packed is None else self.packed)

def product(x, w):
    """x (..., D) times w (N, D), which may be packed: (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") if w.is_mkldnn else F.linear(x, w)

def pack(w):
    """w (N, D) in the layout that a product with few rows reads fastest: on a CPU oneDNN's, else as it is."""
    packs = w.is_cpu and w.numel() >= PACK_FROM and torch.backends.mkldnn.is_available() and (
        w.dtype == torch.float or w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.ops.mkldnn._reorder_linear_weight(w.detach(), 4) if packs else w.detach()      # for 4 rows

def wide(x):
    """x in fp32, unless it is wider already (tests run in float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

@lru_cache
@torch.inference_mode(False)             # the table outlives the call that made it; training may come next
def rope_table(n, head_dim, theta, device):
    """e^(i * position * theta^(-2j/E)), complex (n, 1, E/2), in fp32 whatever the model's dtype is."""
    freqs = theta ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(n, device=device).float(), freqs)[:, None]
    return torch.polar(torch.ones_like(angles), angles)

class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, args):
        super().__init__()
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
        self.head_dim = args.dim // args.n_heads
        self.rope, self.joint = (args.max_seq_len, self.head_dim, args.rope_theta), None
        self.wq = Linear(args.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = Linear(self.n_heads * self.head_dim, args.dim, bias=False)

    def rotate(self, x, pos):
        """x (B, T, heads, E) at positions pos..: turns pairs (2j, 2j+1), as Meta does, as complex numbers."""
        pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))                     # (B, T, heads, E/2)
        turned = pairs * rope_table(*self.rope, x.device)[pos:pos + x.size(1)]
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    def keep(self, k, v, pos, kv=None):
        """Keys, turned, and values (B, T, K, E) from pos on as (B, K, T, E); with a cache, put there in place
        and returned with all before them. For tokens that pass the layer and those that skipped it alike."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if kv is None:
            return k, v
        end = pos + k.size(2)
        kv[0, :, :, pos:end], kv[1, :, :, pos:end] = k, v
        return kv[:, :, :, :end].unbind(0)                           # (B, K, pos+T, E) each

    def forward(self, x, source, pos, T, kv=None):
        """x (B, P+T, D) at positions pos..: attention for the last T, (B, T, D), to K and V made from
        source (B, P+T, D): x itself, but where training copies.  `fuse` joins what makes them."""
        H, K, E, G = self.n_heads, self.n_kv_heads, self.head_dim, self.n_heads // self.n_kv_heads
        joined = self.joint is not None and source is x
        kq, v = (product(x, self.joint).split(((K + H) * E, K * E), -1) if joined else
                 (torch.cat((self.wk(source), self.wq(x)), -1), self.wv(source)))
        k, q = self.rotate(kq.unflatten(-1, (-1, E)), pos).split([K, H], 2)               # (B, P+T, heads, E)
        k, v = self.keep(k, v.unflatten(-1, (K, E)), pos, kv)                             # (B, K, S, E)
        q, S = q[:, x.size(1) - T:].transpose(1, 2), k.size(2)                            # (B, H, T, E)
        if 1 < T == S:                   # nothing comes before: training, a prompt
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G > 1)   # (B, H, T, E)
        else:                            # few rows: the G heads that share K and V become G times as many
            mask = None if T == 1 else x.new_ones(T, S, dtype=torch.bool).tril(S - T).repeat(G, 1)
            q = q.unflatten(1, (K, G)).flatten(2, 3)                                        # (B, K, G T, E)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(2, (G, T)).flatten(1, 2)
        return self.wo(y.transpose(1, 2).flatten(2))

class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, args):
        super().__init__()
        self.w1 = Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = Linear(args.dim, args.ffn_dim, bias=False)
        self.joint = None

    def forward(self, x):
        gate, up = (self.w1(x), self.w3(x)) if self.joint is None else product(x, self.joint).chunk(2, -1)
        return self.w2(F.silu(gate) * up)

class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, args):
        super().__init__()
        self.attention, self.feed_forward = Attention(args), FeedForward(args)
        self.attention_norm, self.ffn_norm = (RMSNorm(args.dim, args.norm_eps) for _ in range(2))

    def forward(self, h, pos=0, kv=None, debt=None, source=None):
        """h (B, T, D) at positions pos.. through the layer; kv (2, B, K, S, E) is the layer's cache, if any.
        debt (B, P, D): the states of the P positions before pos, which skipped this layer.  Their K and V are
        made here, in the matrix product that makes h's own: copying state costs no pass over wk and wv.
        source (B, T, D): in training, the states that the T positions' K and V are made from, if not h."""
        rows = self.attention_norm(h if debt is None else torch.cat((debt, h), 1))
        source = rows if source is None else self.attention_norm(source)
        h = h + self.attention(rows, source, pos - rows.size(1) + h.size(1), h.size(1), kv)
        return h + self.feed_forward(self.ffn_norm(h))

class Transformer(nn.Module):
    """LLaMA-2. tokens (B, T) -> logits (B, T, V), or with labels the losses that LITE averages."""

    def __init__(self, args):
        super().__init__()
        self.args, self.checkpoint_blocks = args, False
        rows = torch.empty(args.vocab_size, args.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, bias=False)

    def init_weights(self):
        """To train from nothing: variance 1 / D, and 1 / (2 L D) where a matrix writes into the residual."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                writes = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=(self.args.dim * (2 * self.args.n_layers if writes else 1)) ** -0.5)
        return self

    def logits(self, h, rows=None):
        """output(norm(h)): (..., D) -> (..., V) in fp32 or wider: one head for all exits and the end.
        rows (N, D): use these rows of the output matrix in place of all V, for (..., N)."""
        return wide(self.output(self.norm(h)) if rows is None else product(self.norm(h), rows))

    @torch.no_grad()
    def fuse(self):
        """For decoding, which waits for weights to be read: join wk, wq, wv and w1, w3, so that products are
        few and large, and pack the larger ones.  The parameters stay (as views, where nothing packs)."""
        for block in self.layers:
            a, f = block.attention, block.feed_forward
            for part, parts in ((a, (a.wk, a.wq, a.wv)), (f, (f.w1, f.w3))):
                joint = torch.cat([linear.weight for linear in parts])
                part.joint = pack(joint)
                if not part.joint.is_mkldnn:
                    for linear, rows in zip(parts, joint.split([linear.out_features for linear in parts])):
                        linear.weight.data = rows
            a.wo.packed, f.w2.packed = pack(a.wo.weight), pack(f.w2.weight)
        self.output.packed = pack(self.output.weight)
        return self.requires_grad_(False)                # an update would not reach what is read

    def new_cache(self, B, S):
        """Room for K and V of S positions, (L, 2, B, K, S, E), not initialised; the caller keeps it."""
        a = self.layers[0].attention
        return self.output.weight.new_empty(len(self.layers), 2, B, a.n_kv_heads, S, a.head_dim)

    def states(self, tokens, exits=(), pos=0, cache=None, leave=None):
        """Yield the state (B, T, D) after each layer in exits (ascending), then the last layer's.
        leave (B, T), in training: the layer n that each token leaves at, or inf.  It runs on, but K and V
        above are made from its state after n layers: what later tokens attend to is as in decoding."""
        h = source = self.tok_embeddings(tokens)
        run = partial(checkpoint, use_reentrant=False) if self.checkpoint_blocks else Block.__call__
        for n, block in enumerate(self.layers, 1):       # h: the state after n - 1 layers
            source = None if leave is None else torch.where(leave[..., None] < n - 1, source, h)
            h = run(block, h, pos, None if cache is None else cache[n - 1], source=source)
            if n in exits and n < len(self.layers):
                yield h
        yield h

    def forward(self, tokens, labels=None, exits=(), leave=None, teacher=None, choices=0.0):
        """Without labels: logits (B, T, V).  With labels (B, T), next tokens or IGNORE: losses (X+1,), each
        a sum over labelled positions: only the caller can count all ranks'.  The head sees these alone,
        LOGIT_ROWS at a time, and again in the backward pass: no exit keeps its (N, V) logits.  A teacher's
        probabilities (N, V) replace labels.  choices: part of exits' losses on the last layer's top token."""
        if labels is None:
            return self.logits(list(self.states(tokens))[-1])

        def cross_entropy(h, parts, *aims):
            logits = self.logits(h)
            return sum(x * F.cross_entropy(logits, aim, reduction="sum") for x, aim in zip(parts, aims) if x)
        loss = partial(checkpoint, cross_entropy, use_reentrant=False, preserve_rng_state=False)
        targets, total = labels.flatten(), 0
        states = [h.flatten(0, 1) for h in self.states(tokens, exits, leave=leave)]          # (B T, D) each
        knows = list(teacher.states(tokens))[-1].flatten(0, 1) if teacher else None
        for i in (targets != IGNORE).nonzero()[:, 0].split(LOGIT_ROWS):
            target = teacher.logits(knows[i]).softmax(-1) if teacher else targets[i]
            choice = self.logits(states[-1][i]).argmax(-1) if choices else target
            aims = [((1 - choices, choices), target, choice)] * (len(states) - 1) + [((1,), target)]
            total = total + torch.stack([loss(h.index_select(0, i), *aim) for h, aim in zip(states, aims)])
        return total

def lite_loss(losses, weights):
    """sum_i w_i L_i / sum_i w_i over exits and last layer, both (X+1,). Without exits: plain tuning."""
    weights = torch.as_tensor(weights, dtype=losses.dtype, device=losses.device)
    return (weights * losses).sum() / weights.sum()

def read_json(path):
    """The JSON object in a file, or an InputError that says what is wrong with it."""
    try:
        if isinstance(value := json.loads(Path(path).read_text()), dict):
            return value
        why = f"a {type(value).__name__}"
    except (OSError, ValueError) as e:
        why = e
    raise InputError(f"{path}: not readable as a JSON object ({why}); restore the original")

def find_checkpoint(folder):
    """The Meta folder meant by `folder`: itself, or the newest save of a train.py output folder (latest)."""
    folder = Path(folder, "latest") if Path(folder, "latest").exists() else Path(folder)
    if (folder / "params.json").exists():
        return folder
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["no such folder"]
    hint = " (this is a Hugging Face folder; take Llama-2-7b, not Llama-2-7b-hf)" * ("config.json" in names)
    raise InputError(f"{folder}: no params.json there, found: {', '.join(names[:5]) or 'nothing'}; expected "
                     f"Meta's params.json, consolidated.NN.pth and tokenizer.model{hint}")

def read_lite(folder):
    """lite.json of a folder: exits, weights, max_seq_len, shortlist (ids), thresholds, and what these were
    chosen for: check, how many of the shortlist's ids, recompute, and calibration; {} without a file."""
    path = Path(folder) / "lite.json"
    lite = read_json(path) if path.exists() else {}
    exits, thresholds, ids = lite.get("exits", []), lite.get("thresholds", {}), lite.get("shortlist", [])
    kinds = [*map(type, (exits, ids, thresholds, lite.get("calibration", {}), lite.get("recompute", True)))]
    if kinds != [list, list, dict, dict, bool] or not all(
            type(n) is int and n >= 0 for n in [*exits, *ids, lite.get("check", 0)]) or not all(
            n.isdecimal() and isinstance(t, (int, float)) and 0 <= t <= 1 for n, t in thresholds.items()):
        raise InputError(f"{path}: exits {exits!r}, thresholds {thresholds!r}; expected a list of layers and "
                         "numbers from 0 to 1 by layer (shortlist: ids; check: a number; recompute: a bool)")
    return lite

def read_args(folder):
    """ModelArgs from params.json (and the context length from lite.json), each value checked."""
    path, kinds = Path(folder) / "params.json", {f.name: f.type | int for f in fields(ModelArgs)}
    params = read_json(path) | {k: v for k, v in read_lite(folder).items() if k == "max_seq_len"}
    try:
        a = ModelArgs(**params)
    except TypeError as e:                               # names the key that is unknown, or missing
        raise InputError(f"{path}: {e}; LLaMA-2 has {', '.join(kinds)}") from None
    for name, value in params.items():                   # an integer will do for a float, true will not
        if (name, value) != ("vocab_size", -1) and (type(value) is bool or not isinstance(value, kinds[name])
                                                    or not (value is None or value > 0)):      # nor nan
            raise InputError(f"{path}: {name} is {value!r}, expected a positive "
                             f"{'integer' if kinds[name] in (int, int | None) else 'number'}")
    if a.dim % (2 * a.n_heads) or a.n_heads % (a.n_kv_heads or a.n_heads):
        raise InputError(f"{path}: dim {a.dim} does not divide into n_heads {a.n_heads} of an even "
                         f"width, or these into n_kv_heads {a.n_kv_heads}")
    return a

def load_tensors(path):
    """What torch.save wrote to path, memory-mapped. weights_only: code in a pickle is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise InputError(f"{path}: refused ({str(e).split('. ')[0][:80]}); expected tensors alone (a pickle "
                         "can run code), as torch.save writes them; is the download complete?") from None

def load_meta(folder, dtype=None, device="cpu"):
    """A Transformer from a Meta folder or one of ours; dtype None keeps the file's. Raises InputError.
    The weights are one shard, or one of each model-parallel process that trained; they are memory-mapped."""
    folder = find_checkpoint(folder)
    args, paths, weights = read_args(folder), sorted(folder.glob("consolidated.*.pth")), {}
    if not paths or paths[-1].name != f"consolidated.{len(paths) - 1:02d}.pth":
        raise InputError(f"{folder}: found {', '.join(p.name for p in paths) or 'no weights'}; expected "
                         "consolidated.00.pth and all shards after it")
    shards = [load_tensors(path) for path in paths]
    for path, s in zip(paths, shards):
        if not isinstance(s, dict) or {type(w) for w in s.values()} != {torch.Tensor} or any(
                w.shape != shards[0].get(key, w).shape for key, w in s.items()):
            raise InputError(f"{path}: not a dictionary of tensors, or not of the first shard's shapes")
    if args.vocab_size == -1:                            # no embeddings: no rows; the check below names them
        args.vocab_size = len(shards[0].get("tok_embeddings.weight", ()))
    with torch.device("meta"):                           # shapes without memory; weights are assigned below
        model = Transformer(args)
    want = model.state_dict()
    if odd := sorted(set().union(*((want.keys() ^ s.keys()) for s in shards)) - {"rope.freqs"}):   # a table
        names = ", ".join(f"{key} {'missing' if key in want else 'unexpected'}" for key in odd[:4])
        raise InputError(f"{folder}: weights do not fit params.json: {names}, {len(odd)} in all")
    for key, w in want.items():                          # one at a time: no second copy of the whole
        parts = [shard.pop(key) for shard in shards]
        by_columns = key.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight"))       # else by rows
        merged = torch.cat(parts, int(by_columns)) if len(parts) > 1 and w.dim() > 1 else parts[0]
        if merged.shape != w.shape:
            raise InputError(f"{folder}: {key} is {tuple(merged.shape)}, params.json says {tuple(w.shape)}; "
                             "is a shard missing?")
        tied = any(merged.data_ptr() == t.data_ptr() for t in weights.values())              # untied here
        weights[key] = merged.to(device, dtype, copy=tied)
    model.load_state_dict(weights, assign=True)
    return model

def save_meta(folder, model, tokenizer, lite, dtype=torch.bfloat16):
    """Write a complete Meta folder into the (new, empty) folder; lite goes into lite.json beside."""
    torch.save({k: w.to("cpu", dtype) for k, w in model.state_dict().items()}, folder / "consolidated.00.pth")
    params = {k: v for k, v in asdict(model.args).items() if v is not None and k != "max_seq_len"}
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    (folder / "lite.json").write_text(json.dumps({"max_seq_len": model.args.max_seq_len, **lite}) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
