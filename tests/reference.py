"""LLaMA and its early exit once more, sharing no code with model.py or generate.py: what the tests compare with.

numpy in float64, one position, one head and one layer at a time; no cache tensor, no batching, no deferral.
"""
import numpy as np


def weights_of(model):
    """Meta's names -> float64 arrays."""
    return {k: v.detach().double().numpy() for k, v in model.state_dict().items()}


class Llama:
    """A naive LLaMA over Meta's weights. K and V are Python lists, one entry a position."""

    def __init__(self, w, n_layers, n_heads, n_kv_heads, eps, theta):
        self.w, self.L, self.H, self.K, self.eps, self.theta = w, n_layers, n_heads, n_kv_heads, eps, theta
        self.E = w["layers.0.attention.wq.weight"].shape[0] // n_heads
        self.keys, self.values = ([{} for _ in range(n_layers)] for _ in range(2))

    @classmethod
    def of(cls, model):
        a = model.args
        return cls(weights_of(model), a.n_layers, a.n_heads, a.n_kv_heads or a.n_heads, a.norm_eps, a.rope_theta)

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x) + self.eps) * self.w[name + ".weight"]

    def turn(self, x, pos):
        """Rotary position: pair (2i, 2i+1) as a complex number, times e^(i pos theta^(-2i/E))."""
        z = x[0::2] + 1j * x[1::2]
        z = z * np.exp(1j * pos * self.theta ** (-np.arange(0, self.E, 2) / self.E))
        out = np.empty(self.E)
        out[0::2], out[1::2] = z.real, z.imag
        return out

    def write_kv(self, layer, pos, h):
        """K and V of one position in one layer, from the state h that enters the layer (or is copied up to it)."""
        x = self.norm(h, f"layers.{layer}.attention_norm")
        k = (self.w[f"layers.{layer}.attention.wk.weight"] @ x).reshape(self.K, self.E)
        self.keys[layer][pos] = np.stack([self.turn(k[j], pos) for j in range(self.K)])
        self.values[layer][pos] = (self.w[f"layers.{layer}.attention.wv.weight"] @ x).reshape(self.K, self.E)

    def layer(self, layer, pos, h):
        """One position through one layer."""
        p = f"layers.{layer}."
        self.write_kv(layer, pos, h)
        q = (self.w[p + "attention.wq.weight"] @ self.norm(h, p + "attention_norm")).reshape(self.H, self.E)
        heads = []
        for j in range(self.H):
            g = j // (self.H // self.K)
            s = np.array([self.turn(q[j], pos) @ self.keys[layer][t][g] for t in range(pos + 1)]) / np.sqrt(self.E)
            p_ = np.exp(s - s.max())
            heads.append(sum(a * self.values[layer][t][g] for t, a in enumerate(p_ / p_.sum())))
        h = h + self.w[p + "attention.wo.weight"] @ np.concatenate(heads)
        x = self.norm(h, p + "ffn_norm")
        gate, up = self.w[p + "feed_forward.w1.weight"] @ x, self.w[p + "feed_forward.w3.weight"] @ x
        return h + self.w[p + "feed_forward.w2.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def head(self, h):
        return self.w["output.weight"] @ self.norm(h, "norm")

    def states(self, token, pos):
        """The state of one token after 1..L layers, all of them run."""
        h, out = self.w["tok_embeddings.weight"][token], []
        for layer in range(self.L):
            h = self.layer(layer, pos, h)
            out.append(h)
        return out

    def logits(self, tokens):
        """(T, V), from an empty start."""
        self.keys, self.values = ([{} for _ in range(self.L)] for _ in range(2))
        return np.stack([self.head(self.states(t, pos)[-1]) for pos, t in enumerate(tokens)])

    def early_exit(self, prompt, n_new, thresholds, said=None, frequent=None):
        """Greedy decoding with early exit and *eager* copying, LITE by its definition. Returns tokens and layers run.
        said: emit these tokens, not its own.  frequent: what an exit may choose, beside the tokens so far."""
        self.keys, self.values = ([{} for _ in range(self.L)] for _ in range(2))
        for pos, t in enumerate(prompt):
            h = self.states(t, pos)[-1]
        logits, tokens, exits, depth = self.head(h), [], [], self.L
        while True:
            tokens.append(said[len(tokens)] if said else int(np.argmax(logits)))
            exits.append(depth)
            if len(tokens) == n_new:
                return tokens, exits
            pos, h = len(prompt) + len(tokens) - 1, self.w["tok_embeddings.weight"][tokens[-1]]
            for layer in range(self.L):
                h, depth = self.layer(layer, pos, h), layer + 1
                if depth in thresholds and depth < self.L:
                    logits = self.head(h)
                    if frequent is not None:
                        logits[[t for t in range(len(logits)) if t not in {*frequent, *prompt, *tokens}]] = -np.inf
                    p = np.exp(logits - logits.max())
                    if p.max() / p.sum() > thresholds[depth]:
                        break
            else:
                logits = self.head(h)
            for skipped in range(depth, self.L):         # the copy: at once, for every layer above
                self.write_kv(skipped, pos, h)


def as_transformers(model):
    """transformers' LlamaForCausalLM with this model's weights."""
    import transformers
    a, state = model.args, model.state_dict()

    def halves(w, heads):                                # Hugging Face rotates halves, Meta pairs: reorder the rows
        return w.view(heads, -1, 2, w.size(1)).transpose(1, 2).reshape_as(w)

    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj",
             "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
             "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    theirs = {"model.embed_tokens.weight": state["tok_embeddings.weight"], "model.norm.weight": state["norm.weight"],
              "lm_head.weight": state["output.weight"]}
    for i in range(a.n_layers):
        for ours, name in names.items():
            w = state[f"layers.{i}.{ours}.weight"]
            heads = {"wq": a.n_heads, "wk": a.n_kv_heads or a.n_heads}.get(ours.split(".")[-1])
            theirs[f"model.layers.{i}.{name}.weight"] = halves(w, heads) if heads else w
    config = transformers.LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.dim, intermediate_size=a.ffn_dim, num_hidden_layers=a.n_layers,
        num_attention_heads=a.n_heads, num_key_value_heads=a.n_kv_heads, rms_norm_eps=a.norm_eps, rope_theta=a.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=a.rope_theta), max_position_embeddings=4096)
    other = transformers.LlamaForCausalLM(config)
    other.load_state_dict(theirs, assign=True)           # in their own dtype; the rotary table stays fp32
    return other.eval()
