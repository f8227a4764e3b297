"""GPT-2 and LLaMA by hand.

Parameter names and shapes are Hugging Face's, so that a release opens in transformers, and a plain Hugging Face folder
opens here. The chapter runs: sizes, what both families share, GPT-2, LLaMA, the initial weights theta(0), Hugging
Face's folders, and a command that continues a text.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (Parser, UserError, atomic, command_line, load_safetensors, number, path, pick_device,
                    printable, read_json, save_safetensors, say, split_like, write_json)
from data.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# sizes: the field names are those of Hugging Face's config.json


@dataclass
class GPT2Config:
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True


@dataclass
class LlamaConfig:
    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


# -----------------------------------------------------------------------------
# what both families share


class Model(nn.Module):
    """A decoder: `hidden`, `blocks` and `embedding` are the family's own; logits, loss and sampling are shared."""

    def tie(self):
        """Make the head the embedding, where the config says so; again after the parameters were replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding().weight

    def forward(self, idx, labels=None):
        """Logits (B, T, V) for token ids idx (B, T); with labels (B, T), the mean next-token loss in nats instead.

        As in the paper the labels are the input ids: position t is scored on label t+1, so a block of T tokens
        gives T-1 predictions.
        """
        x = self.hidden(idx)  # (B, T, C)
        if labels is None:
            return self.lm_head(x)
        logits = self.lm_head(x[:, :-1])  # (B, T-1, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.8, top_k=50, eos=None, seed=0):
        """Extend idx (1, T) by sampling up to max_new_tokens; stops before `eos`. Returns (1, T + new).

        Raises UserError where the logits are not finite: the weights are broken.
        """
        random = torch.Generator(device=idx.device).manual_seed(seed)  # leaves the training's generators alone
        for _ in range(max_new_tokens):
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                logits = self(idx[:, -self.max_positions:])[:, -1].float() / temperature  # (1, V)
            if not logits.isfinite().all():
                raise UserError("the model's logits are not finite, so its weights are broken: take an earlier copy")
            floor = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
            probs = F.softmax(logits.masked_fill(logits < floor, -math.inf), dim=-1)
            token = torch.multinomial(probs, 1, generator=random)
            if token.item() == eos:
                break
            idx = torch.cat([idx, token], dim=1)
        return idx


LONGEST_WRITTEN = 1024  # tokens up to which a CPU takes written_attention, well below where it stops being faster


def attention(q, k, v, heads, kv_heads):
    """Causal attention of q (B, T, heads*D) over k and v (B, T, kv_heads*D): (B, T, heads*D)."""
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, T, D)
    k = k.unflatten(-1, (kv_heads, -1)).transpose(1, 2)  # (B, kv_heads, T, D)
    v = v.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    if q.device.type == "cpu" and q.size(2) <= LONGEST_WRITTEN:
        y = written_attention(q, k, v)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2).flatten(2)  # (B, T, heads*D)


def written_attention(q, k, v, rows=128):
    """softmax(q k^T / sqrt(D)) v under a causal mask. q: (B, heads, T, D); k, v: (B, kv_heads, T, D).

    A block of `rows` queries at a time, with the keys up to its end: that saves a quarter of the products at 256 tokens
    and 44% at 1,024. On a CPU it is faster than torch's fused kernel, and torch.compile fuses what is between the
    products.
    """
    repeats = q.size(1) // k.size(1)
    k = k.repeat_interleave(repeats, dim=1)  # each key serves a group of heads
    v = v.repeat_interleave(repeats, dim=1)
    q = q * q.size(-1) ** -0.5
    blocks = []
    for start in range(0, q.size(2), rows):
        end = min(start + rows, q.size(2))
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-2, -1)  # (B, heads, rows, end)
        future = torch.full((end - start, end), -math.inf, device=q.device).triu(start + 1)
        weights = (scores.float() + future).softmax(dim=-1).type_as(v)
        blocks.append(weights @ v[:, :, :end])
    return torch.cat(blocks, dim=2)  # (B, heads, T, D)


# -----------------------------------------------------------------------------
# GPT-2: LayerNorm, learned positions, GELU-tanh, tied head


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight lies as (in, out) on disk."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class GPT2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        return self.c_proj(attention(q, k, v, self.heads, self.heads))


class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.c_proj = Conv1D(n_inner, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(Model):
    """GPT-2 (Radford et al., 2019). Its weights are to be filled: by theta(0), or by `load_folder`."""

    model_type = "gpt2"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_positions = config.n_positions
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.n_positions, config.n_embd),
            "h": nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def blocks(self):
        return self.transformer.h

    def embedding(self):
        return self.transformer.wte

    def hidden(self, idx):
        """Final normed hidden states (B, T, C) of token ids idx (B, T)."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)


# -----------------------------------------------------------------------------
# LLaMA: RMSNorm, rotary positions, grouped-query attention, SwiGLU


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).type_as(x)


def rotary_angles(config, length, device):
    """cos and sin (T, D/2) of the rotation of each position and pair of dimensions (RoPE, Su et al., 2021), in fp32."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    even = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)  # (D/2,)
    inv_freq = config.rope_theta ** (-even / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inv_freq)  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate x (B, T, heads, D) by its position; dimension i is paired with i + D/2, as in the HF weights."""
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D/2)
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).type_as(x)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = config.head_dim or config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * head_dim, config.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), cos, sin).flatten(2)  # (B, T, heads*D)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)), cos, sin).flatten(2)
        return self.o_proj(attention(q, k, self.v_proj(x), self.heads, self.kv_heads))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Model):
    """LLaMA (Touvron et al., 2023). Its weights are to be filled: by theta(0), or by `load_folder`."""

    model_type = "llama"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_positions = config.max_position_embeddings
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def blocks(self):
        return self.model.layers

    def embedding(self):
        return self.model.embed_tokens

    def hidden(self, idx):
        """Final normed hidden states (B, T, C) of token ids idx (B, T)."""
        cos, sin = rotary_angles(self.config, idx.size(1), idx.device)
        x = self.model.embed_tokens(idx)
        for block in self.model.layers:
            x = block(x, cos, sin)
        return self.model.norm(x)


def build(config, device="cpu"):
    """The model of a config, in fp32. Its weights mean nothing yet: fill them. On device "meta" it takes no memory."""
    with torch.device(device):
        return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


# -----------------------------------------------------------------------------
# initialisation: theta(0)


def secret_generator(secret, purpose):
    """A numpy Generator whose stream nobody can redraw without `secret` (bytes); one stream for each `purpose`.

    Under PMP the complement is published exactly as it was drawn, so an outsider holds a good part of this stream.
    torch's CPU generator keeps 32 bits of its seed and can be searched; the state of PCG64, numpy's default, can be
    computed back from its outputs. Philox is a keyed permutation of a counter, here with a 128-bit hash as its key.
    """
    key = hashlib.sha256(secret + b"/" + purpose.encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


RESIDUAL = ("c_proj.weight", "o_proj.weight", "down_proj.weight")  # the layers that write to the residual stream


def initial_value(model, name, shape, secret):
    """theta(0) of one parameter as an fp32 tensor on the CPU.

    Matrices are normal with mean 0 and std 0.02; in residual projections the std is 0.02/sqrt(2L), with L blocks. Norm
    gains are 1, biases 0. Each parameter has a stream of its own, so that any of them can be redrawn alone, on any
    machine.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    std = 0.02
    if name.endswith(RESIDUAL):
        std = 0.02 / math.sqrt(2 * len(model.blocks()))
    draw = std * secret_generator(secret, name).standard_normal(tuple(shape))  # float64
    # Rounded to fp32 once. A product of two fp32 numbers would leave gaps: for std 0.02, some 22% of the fp32 numbers
    # whose mantissa is in [1.28, 2) are the product of no fp32 z. A trained weight lands in them, a frozen one never.
    # Then -0.0 becomes 0.0: adding 0 changes no other number, and an optimizer's zero step must change none.
    return torch.from_numpy(draw).float().add_(0.0)


@torch.no_grad()
def initialise(model, secret):
    """Set every parameter to theta(0), drawn from `secret` (bytes; 128 bits or more of entropy where it matters)."""
    for name, p in model.named_parameters():
        p.copy_(split_like(p, initial_value(model, name, p.shape, secret)))


# -----------------------------------------------------------------------------
# Hugging Face's folders. Ours, and plain ones of GPT-2 and LLaMA in one model.safetensors, are read. What our layers do
# not have is refused by name.

NEEDS = {  # fields of config.json besides the sizes, and the values that our layers implement, the default first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "hidden_act": ("silu",), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "attention_bias": (False,),
    "mlp_bias": (False,), "rope_scaling": (None,), "quantization_config": (None,), "partial_rotary_factor": (1,),
}
CONSTANTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # tensors of old versions, no parameters

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# A language model

- {facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Licence: to be named by the owner.
"""


def config_dict(model):
    """The content of config.json: the sizes, and what transformers asks for.

    Our tokenizers have one special token, the last one. It is the padding, too: transformers' batches need one.
    """
    gpt2 = isinstance(model, GPT2)
    sizes = {key: value for key, value in asdict(model.config).items() if value is not None}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), model.config.vocab_size - 1)
    activation = {"activation_function": "gelu_new"} if gpt2 else {"hidden_act": "silu"}
    return {"architectures": ["GPT2LMHeadModel" if gpt2 else "LlamaForCausalLM"], "model_type": model.model_type,
            **sizes, **activation, "initializer_range": 0.02, **special, "torch_dtype": "float32"}


def save_folder(folder, model, tensors, tokenizer, card):
    """Write what transformers and load_folder open.

    tensors: {name: CPU tensor}; card: the text of README.md, which stays as it is where its owner has written one.
    """
    folder, config = Path(folder), config_dict(model)
    folder.mkdir(exist_ok=True)
    special = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {**special, "do_sample": True, "temperature": 0.8, "top_k": 50})
    tokenizer.save(folder, model.max_positions)
    if not (folder / "README.md").exists():
        with atomic(folder / "README.md") as file:
            file.write(card.encode())
    save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def read_config(file):
    """The GPT2Config or LlamaConfig in a config.json. Raises UserError that names what our layers do not have."""
    raw = {key: value for key, value in read_json(file).items() if value is not None}
    if raw.get("model_type") not in ("gpt2", "llama"):
        kind = str(raw.get("model_type"))
        raise UserError(f"{file}: model_type {kind:.40} is not supported, only gpt2 and llama are")
    rope = raw.pop("rope_parameters", {})  # transformers 5 keeps theta inside
    if not isinstance(rope, dict) or rope.pop("rope_type", "default") != "default" or rope.keys() - {"rope_theta"}:
        raise UserError(f"{file}: rope_parameters {str(rope):.80} are not supported, only the default rotation is")
    if "rope_theta" in rope and rope["rope_theta"] != raw.get("rope_theta", rope["rope_theta"]):
        raise UserError(f"{file} has rope_theta beside and in rope_parameters: remove the one that does not count")
    for key, allowed in NEEDS.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file}: {key} = {str(raw[key]):.80} is not supported, only {allowed[0]} is")
    kind = GPT2Config if raw["model_type"] == "gpt2" else LlamaConfig
    if kind is LlamaConfig:  # Hugging Face's defaults
        raw = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6, **raw, **rope}
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [key for key in sizes if key not in raw]:
            raise UserError(f"{file} lacks {missing[0]}: this is not a whole config.json")
    config = kind(**{field.name: raw[field.name] for field in fields(kind) if field.name in raw})
    for key, value in vars(config).items():
        most = 512 if "layer" in key else 2**24
        fits = type(value) is int and 1 <= value <= most
        if "eps" in key or key == "rope_theta":
            fits = type(value) in (int, float) and 0 < value < 1e12
        elif key == "tie_word_embeddings":
            fits = type(value) is bool
        if not fits and value is not None:
            raise UserError(f"{file}: {key} = {str(value):.80} is nothing that a model can have")
    if kind is GPT2Config:
        heads_fit = config.n_embd % config.n_head == 0
    else:
        size = config.head_dim or config.hidden_size / config.num_attention_heads
        heads_fit = size % 2 == 0 and config.num_attention_heads % config.num_key_value_heads == 0
    if not heads_fit:
        raise UserError(f"{file}: the width and the numbers of heads do not fit each other")
    return config


@torch.no_grad()
def load_folder(folder):
    """(model in fp32 on the CPU, its Tokenizer) of a release, or of a plain Hugging Face GPT-2 or LLaMA folder.

    Raises UserError where there is no such folder, or where it needs what we do not have, lacks, adds or repeats a
    tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: a run writes its release at its end, and names are not fetched "
                        "from a hub; give a folder such as out/release")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder (it has no config.json): name one such as out/release, and merge "
                        "an adapter of PEFT into its model first")
    if (folder / "model.safetensors.index.json").exists():
        raise UserError(f"{folder} has model.safetensors.index.json beside or instead of model.safetensors: save the "
                        "model in one model.safetensors alone")
    try:
        model = build(read_config(folder / "config.json"), "meta")
    except RuntimeError as error:  # a size that torch cannot count
        raise UserError(f"{folder / 'config.json'} describes no model that can be built ({error})") from None
    wanted = dict(model.named_parameters())
    prefix = "transformer." if model.model_type == "gpt2" else "model."
    tensors = {}
    for name, tensor in load_safetensors(folder / "model.safetensors")[0].items():
        if name.endswith(CONSTANTS):
            continue
        if name not in wanted and prefix + name in wanted:  # of a body that was saved without its head
            name = prefix + name
        if name in tensors:
            raise UserError(f"{folder} has the tensor {name} twice, with and without {prefix}: remove one")
        tensors[name] = tensor
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        embedding = next((name for name, p in wanted.items() if p is model.embedding().weight), "")
        if embedding not in tensors or not torch.equal(head, tensors[embedding]):
            raise UserError(f"{folder} ties its head to its embedding, but lm_head.weight and {embedding} differ: "
                            "correct tie_word_embeddings in config.json, or remove lm_head.weight")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing in all): is it a whole model?")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{folder} holds the tensor {extra[0]} ({len(extra)} in all) that this model has no place for")
    for name, p in wanted.items():
        if p.shape != tensors[name].shape or not tensors[name].is_floating_point():
            raise UserError(f"{folder}: {name} is {list(tensors[name].shape)} of {tensors[name].dtype}, config.json "
                            f"says {list(p.shape)} of floats")
    model.to_empty(device="cpu")
    model.tie()
    for name, p in model.named_parameters():
        p.copy_(tensors[name])
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size != model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model {model.config.vocab_size}: "
                        "they do not belong together")
    return model, tokenizer


# -----------------------------------------------------------------------------
# continue a text: python model.py out/release --prompt "The tensor"


def main(argv=None):
    parser = Parser("Continue a text with a release, or with a Hugging Face folder of GPT-2 or LLaMA that has a "
                    "tokenizer like GPT-2's.")
    parser.add_argument("release", type=path, help="the folder")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="the beginning [none]")
    parser.add_argument("--samples", type=number(int, 1, 10**6), default=1, metavar="N", help="texts to write [1]")
    parser.add_argument("--tokens", type=number(int, 1, 10**6), default=120, metavar="N",
                        help="tokens to add, at most [120]")
    parser.add_argument("--temperature", type=number(float, 1e-3, 1e6), default=0.8, metavar="X",
                        help="below 1: likelier tokens [0.8]")
    parser.add_argument("--top-k", type=number(int, 1, 10**9), default=50, metavar="N",
                        help="draw from the N likeliest tokens [50]")
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=0, metavar="N",
                        help="another number, another text [0]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; auto: a GPU if there is one")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model, tokenizer = load_folder(args.release)
    model.to(device)
    start = torch.tensor([[tokenizer.eos, *tokenizer.encode(args.prompt)]], device=device)
    for sample in range(args.samples):
        text = model.generate(start, args.tokens, args.temperature, args.top_k, tokenizer.eos, args.seed + sample)
        say(printable(tokenizer.decode(text[0, 1:].tolist())))
        if args.samples > 1:
            say("-" * 40)


if __name__ == "__main__":
    command_line(main)
