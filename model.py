"""GPT-2 and LLaMA by hand, and their weights on disk.

Parameter names, shapes and config.json are Hugging Face's, so that a release opens in transformers and a plain
Hugging Face folder opens here, without renaming. The chapter runs: shapes, attention, GPT-2, LLaMA, loss and
generation, sharded tensors, initialisation, LoRA, safetensors, folders.
"""

import hashlib
import json
import math
import os
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import UserError, atomic

# -----------------------------------------------------------------------------
# shapes: the field names are those of config.json


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


PRESETS = {
    "tiny": LlamaConfig(
        vocab_size=4096, max_position_embeddings=1024, hidden_size=256, intermediate_size=704,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    ),
    "mini": LlamaConfig(  # half of tiny: for sweeps of many models on a laptop
        vocab_size=4096, max_position_embeddings=1024, hidden_size=192, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(),
    "tinyllama": LlamaConfig(),  # the paper's 1.1B shape, section 4.1, with GPT-2's vocabulary
}

# -----------------------------------------------------------------------------
# what both families share


class Model(nn.Module):
    """A decoder: `hidden` is the family's own; logits, loss and sampling are shared.

    `checkpointing = True` recomputes each block's activations in the backward pass instead of keeping them.
    """

    checkpointing = False

    def tie(self):
        """Make the head the embedding, where the config says so; again after the parameters were replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding().weight

    def run_blocks(self, x, *args):
        for block in self.blocks():
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *args, use_reentrant=False)
            else:
                x = block(x, *args)
        return x  # (B, T, C)

    def forward(self, idx, labels=None):
        """Logits (B, T, V) for token ids idx (B, T); with labels (B, T), the mean next-token loss in nats instead.

        As in the paper the labels are the input ids: position t is scored on label t+1, so a block of T tokens
        gives T-1 predictions.
        """
        x = self.hidden(idx)  # (B, T, C)
        if labels is None:
            return F.linear(x, self.lm_head.weight)
        logits = F.linear(x[:, :-1].flatten(0, 1), self.lm_head.weight)  # (B*(T-1), V)
        return NextTokenLoss.apply(logits, labels[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.8, top_k=50, eos=None, seed=0):
        """Extend idx (1, T) by sampling up to max_new_tokens; stops behind `eos`. Returns (1, T + new)."""
        random = torch.Generator(device=idx.device).manual_seed(seed)  # leaves the training's generators alone
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.max_positions:])[:, -1].float() / temperature  # (1, V)
            floor = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
            probs = F.softmax(logits.masked_fill(logits < floor, -math.inf), dim=-1)
            token = torch.multinomial(probs, 1, generator=random)
            idx = torch.cat([idx, token], dim=1)
            if eos is not None and token.item() == eos:
                break
        return idx


class NextTokenLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of logits (N, V) against labels (N,), computed in fp32 a slice of rows at a time.

    With a large vocabulary the logits are the largest tensor of the whole step. They are kept once, in the precision
    that the matrix product gave them, and the backward pass turns them into their own gradient in place: there is
    never a second copy, and backward can run only once.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        parts = [F.cross_entropy(part.float(), label, reduction="sum") for part, label in slices(logits, labels)]
        return torch.stack(parts).sum() / len(labels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        for part, label in slices(logits, labels):
            p = part.float().softmax(dim=-1)  # (rows, V)
            p.scatter_add_(1, label[:, None], p.new_full((len(p), 1), -1.0))
            part.copy_(p.mul_(grad / len(labels)))
        return logits, None


def slices(logits, labels):
    """Rows of logits (N, V) and labels (N,) in step, as many at a time as stay in a CPU's cache or fill a GPU."""
    rows = max(1, (2**18 if logits.device.type == "cpu" else 2**24) // logits.size(1))
    return zip(logits.split(rows), labels.split(rows))


def attention(q, k, v, heads, kv_heads):
    """Causal attention of q (B, T, heads*D) over k and v (B, T, kv_heads*D): (B, T, heads*D)."""
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2).flatten(2)  # (B, T, heads*D)


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
    """GPT-2 (Radford et al., 2019). Weights are uninitialised until `initialise` or `load_folder` fills them."""

    prefix = "transformer."

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
        return self.transformer.ln_f(self.run_blocks(x))


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
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    speed = config.rope_theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)  # (D/2,)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speed)  # (T, D/2)
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
        size = config.head_dim or config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, config.hidden_size, bias=False)

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
    """LLaMA (Touvron et al., 2023). Weights are uninitialised until `initialise` or `load_folder` fills them."""

    prefix = "model."

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
        return self.model.norm(self.run_blocks(self.model.embed_tokens(idx), cos, sin))


def build(config, device="cpu"):
    """The model of a config, in fp32, weights not yet filled; on device "meta" it takes no memory."""
    with torch.device(device):
        return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


# -----------------------------------------------------------------------------
# sharded tensors: under --shard each parameter is a DTensor, split by rows over the ranks. For an ordinary tensor these
# functions are the identity.


def sharded(tensor):
    return hasattr(tensor, "to_local")  # importing the class DTensor would take as long as importing torch


def local(tensor):
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if sharded(tensor) else tensor


def whole(tensor):
    """All of a tensor, gathered on every rank: where it is sharded, every rank must call this, in the same order."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def rows(tensor, p):
    """What this rank holds of p, out of a tensor of p's full shape: ceil(rows / ranks) rows, or what is left."""
    if not sharded(p):
        return tensor
    size = -(-len(tensor) // p.device_mesh.size())
    return tensor[p.device_mesh.get_local_rank() * size :][:size].clone()


def sharded_like(p, part):
    """The tensor of p's full shape, sharded as p is, of which this rank holds `part`."""
    if not sharded(p):
        return part
    return type(p).from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


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
MATRICES = ("wte.weight", "wpe.weight", "embed_tokens.weight", "lm_head.weight", "c_attn.weight", "c_fc.weight",
            "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight", "norm.weight", "layernorm.weight")


def initial_value(model, name, shape, secret):
    """theta(0) of one parameter as an fp32 tensor on the CPU; a name that no rule covers raises KeyError.

    N(0, 0.02), the residual projections scaled by 1/sqrt(2L); norm gains 1, biases 0. Each parameter has a stream of
    its own, so that any of them can be redrawn alone, on any machine.
    """
    layers = len(model.blocks())
    if name.endswith(RESIDUAL):
        std = 0.02 / math.sqrt(2 * layers)
    elif name.endswith(MATRICES):
        std = 0.02
    elif name.endswith(NORMS):
        return torch.ones(shape)
    elif name.endswith(".bias"):
        return torch.zeros(shape)
    else:
        raise KeyError(f"no initialisation rule for parameter {name}")
    draw = secret_generator(secret, name).standard_normal(tuple(shape), dtype=np.float32)
    # one draw in 2**24 is -0.0, the one number that adding 0 changes: an optimizer's zero step would give it away
    return torch.from_numpy(draw).mul_(std).add_(0.0)


@torch.no_grad()
def initialise(model, secret):
    """Set every parameter to theta(0), drawn from `secret` (bytes; 128 bits or more of entropy where it matters)."""
    for name, p in model.named_parameters():
        local(p).copy_(rows(initial_value(model, name, p.shape, secret), p))


# -----------------------------------------------------------------------------
# LoRA (Hu et al., 2022)

LORA_TARGETS = ("c_attn", "q_proj", "v_proj")


class LoRA(nn.Module):
    """A linear layer whose weight is W + (alpha/r) B A, or W + (alpha/r) (B A) * mask for an authorised user.

    W and its bias are frozen; B starts at zero, so the layer starts as the identity of its base. The sum is formed
    before the product with x: a masked B A has no low rank to use, and one way serves both.
    """

    def __init__(self, base, rank, alpha, mask=None, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        rows, cols = base.weight.shape
        self.scale = alpha / rank
        bound = 1 / math.sqrt(cols)
        start = torch.empty(rank, cols).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=base.weight.device))
        self.register_buffer("mask", mask, persistent=False)  # bool like W, or None

    def weight(self):
        update = self.B @ self.A * self.scale
        return self.base.weight + (update if self.mask is None else update * self.mask)

    def forward(self, x):
        if isinstance(self.base, Conv1D):
            return F.linear(x, self.weight().t(), self.base.bias)
        return F.linear(x, self.weight(), self.base.bias)


def add_lora(model, rank=8, alpha=16, masks=None, seed=0):
    """Freeze `model` and put LoRA on q and v (LLaMA) or c_attn (GPT-2). masks: {parameter name: bool}, or None.

    Returns the LoRA modules. `merge_lora` undoes it.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added = []
    for name, module in list(model.named_modules()):
        for target in LORA_TARGETS:
            if hasattr(module, target):
                mask = masks[f"{name}.{target}.weight"] if masks else None
                added.append(LoRA(getattr(module, target), rank, alpha, mask, generator))
                setattr(module, target, added[-1])
    return added


@torch.no_grad()
def merge_lora(model):
    """Add each LoRA update to the weight below it and take the LoRA layers out again."""
    for module in list(model.modules()):
        for target in LORA_TARGETS:
            if isinstance(layer := getattr(module, target, None), LoRA):
                layer.base.weight.copy_(layer.weight())
                setattr(module, target, layer.base)


# -----------------------------------------------------------------------------
# safetensors: 8 bytes of header length, a JSON header, raw little-endian tensors. No pickle, so nothing to execute.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw_bytes(tensor):
    """The memory of a tensor, gathered and copied to the CPU where needed, as a flat numpy uint8 array."""
    return whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def save_safetensors(path, tensors, metadata, mode=0o644, write=True):
    """Write {name: tensor} and {str: str} metadata atomically. A checksum of the tensors joins the metadata.

    Sharded tensors are gathered one at a time, for which every rank calls this, all but one with write=False.
    """
    header, offset, crc = {}, 0, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size

    def head():  # as long with one checksum as with another
        text = json.dumps({"__metadata__": {**metadata, "crc32": f"{crc:010d}"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    with atomic(path, mode) if write else open(os.devnull, "wb") as file:
        file.write(head())
        for tensor in tensors.values():
            data = raw_bytes(tensor)
            crc = zlib.crc32(data, crc)
            file.write(data)
        file.seek(0)
        file.write(head())


def load_safetensors(path):
    """Read ({name: tensor}, metadata) onto the CPU. The tensors are views of the file, unused ones cost no memory.

    Raises UserError where the file is missing, is not safetensors, is cut short or fails its checksum.
    """
    try:
        content = np.memmap(path, np.uint8, "c")  # copy on write: the file stays as it is, whatever happens to a tensor
        length = struct.unpack("<Q", content[:8].tobytes())[0]
        header = json.loads(content[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__", {})
        data = torch.from_numpy(content[8 + length :])
        tensors = {}
        for name, entry in header.items():
            (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
            part = data[start:end]
            if (8 + length) % dtype.itemsize or start % dtype.itemsize:
                part = part.clone()  # a copy is aligned to its element size, a slice of the file need not be
            tensors[name] = part.view(dtype).view(entry["shape"])
        complete = max((entry["data_offsets"][1] for entry in header.values()), default=0) == len(data)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error):
        raise UserError(f"{path} is no safetensors file, or is damaged: restore it from a copy") from None
    if not complete or ("crc32" in metadata and zlib.crc32(data.numpy()) != int(metadata["crc32"])):
        raise UserError(f"{path} is damaged (its size or checksum is wrong): restore it from a copy")
    return tensors, metadata


def fingerprint(tensors):
    """sha256 (hex) over names, shapes and bytes of {name: tensor}, whatever their order: the identity of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# folders in the Hugging Face layout

# What our layers do; a config.json that asks for anything else is refused by the name of the field.
GPT2_NEEDS = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
              "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
LLAMA_NEEDS = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}


def config_to_dict(config):
    """config.json of a model: our fields plus what transformers asks for. Holds nothing about rho or the mask."""
    gpt2 = isinstance(config, GPT2Config)
    own = {key: value for key, value in asdict(config).items() if value is not None}
    eos = config.vocab_size - 1
    return {
        "architectures": ["GPT2LMHeadModel" if gpt2 else "LlamaForCausalLM"],
        "model_type": "gpt2" if gpt2 else "llama",
        **own,
        **({"activation_function": "gelu_new"} if gpt2 else {"hidden_act": "silu"}),
        "initializer_range": 0.02,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }


def config_from_dict(raw, where):
    """The GPT2Config or LlamaConfig of a config.json's content. Raises UserError naming what we do not have."""
    kind = {"gpt2": GPT2Config, "llama": LlamaConfig}.get(raw.get("model_type"))
    if kind is None:
        raise UserError(f"{where}: model_type {raw.get('model_type')!r} is not supported, only gpt2 and llama are")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key, allowed in (GPT2_NEEDS if kind is GPT2Config else LLAMA_NEEDS).items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} = {raw[key]!r} is not supported, only {allowed[0]!r} is")
    if "quantization_config" in raw:
        raise UserError(f"{where}: quantization_config is not supported: use the unquantized weights")
    # transformers 5 keeps theta inside rope_parameters, 4 has it beside rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
        raise UserError(f"{where}: rope_scaling {rope!r} is not supported, only the default rotary embedding is")
    if kind is LlamaConfig:
        raw = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6, **raw}  # HF's defaults
        raw.update({key: rope[key] for key in ("rope_theta",) if key in rope})
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [key for key in needed if key not in raw]:
            raise UserError(f"{where}: {missing[0]} is missing: this is not a whole config.json")
    return kind(**{f.name: raw[f.name] for f in fields(kind) if f.name in raw})


def save_folder(folder, model, write=True):
    """Write config.json and model.safetensors (the weights as they are) for transformers and for load_folder.

    For a sharded model every rank calls this, all but one with write=False.
    """
    folder = Path(folder)
    if write:
        with atomic(folder / "config.json") as file:
            file.write(json.dumps(config_to_dict(model.config), indent=2).encode() + b"\n")
    save_safetensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"}, write=write)


def load_folder(folder):
    """Open a release, or any plain Hugging Face GPT-2 or LLaMA folder, as a model in fp32 on the CPU.

    Raises UserError where the folder is none, needs what we do not have, or lacks or adds a tensor.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except OSError:
        raise UserError(f"{folder} is no model folder (it has no config.json): name one such as out/release") from None
    except ValueError:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: restore it from a copy") from None
    if not isinstance(raw, dict):
        raise UserError(f"{folder / 'config.json'} is not a model's configuration: restore it from a copy")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors = {}
    for name in files:
        tensors.update(load_safetensors(folder / name)[0])

    config = config_from_dict(raw, folder / "config.json")
    model = build(config)
    wanted = dict(model.named_parameters())
    for name in list(tensors):
        if name not in wanted and model.prefix + name in wanted:  # a bare GPT2Model or LlamaModel was saved
            tensors[model.prefix + name] = tensors.pop(name)
        elif name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):  # constants of old versions
            del tensors[name]
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing in all): is it a whole model?")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{folder} holds the tensor {extra[0]} ({len(extra)} in all) that this model has no place for")
    with torch.no_grad():
        for name, p in wanted.items():
            if p.shape != tensors[name].shape:
                raise UserError(f"{folder}: {name} is {list(tensors[name].shape)}, config.json says {list(p.shape)}")
            p.copy_(tensors[name])
    return model
