"""Hugging Face's folders, in and out: config.json and model.safetensors.

A model is described by two classes: a dataclass of its sizes, whose fields have the names of config.json, and the model
itself, built from one, with a class attribute `model_type`. Both come from the caller as `families`, {model_type:
(config class, model class)}. The model has tie(), which makes the head the embedding where the config says so.

A folder comes from anywhere. Its sizes are checked before a model is described from them, and the model is built only
when every tensor has turned out to be in the file, in its shape.
"""

import re
import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .files import UserError, atomic, disk_errors, read_json, write_json
from .parallel import assign, rank
from .safetensors import load_safetensors, save_safetensors


@dataclass(frozen=True)
class Kind:
    """What Hugging Face asks for in a config.json of one model_type, and what of it our layers can do."""

    architecture: str
    prefix: str  # of the parameters of a body that was saved without its head
    says: dict  # what we write besides the sizes
    needs: dict  # field -> the values that our layers implement, the default first
    sizes: tuple  # fields that every config.json has; the others have defaults
    multiple: tuple  # two fields, the first a multiple of the second


KINDS = {
    "gpt2": Kind("GPT2LMHeadModel", "transformer.", {"activation_function": "gelu_new"}, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    }, (), ("n_embd", "n_head")),
    "llama": Kind("LlamaForCausalLM", "model.", {"hidden_act": "silu"}, {
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    }, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads")),
}

WHOLE, REAL = (int,), (int, float)  # the types of a number, of which bool is none
RANGES = {  # field of config.json -> its types, its least and its largest value
    **dict.fromkeys(("vocab_size", "n_positions", "max_position_embeddings"), (WHOLE, 1, 2**24)),
    **dict.fromkeys(("n_embd", "hidden_size", "n_inner", "intermediate_size"), (WHOLE, 1, 2**20)),
    **dict.fromkeys(("n_layer", "num_hidden_layers"), (WHOLE, 1, 256)),
    **dict.fromkeys(("n_head", "num_attention_heads", "num_key_value_heads", "head_dim"), (WHOLE, 1, 2**16)),
    **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), (REAL, 1e-30, 1)),
    "rope_theta": (REAL, 1, 1e12),
    "tie_word_embeddings": ((bool,), False, True),
}


# ---- config.json ---------------------------------------------------------------------------------------------------


def config_to_dict(config, model_type):
    """The content of config.json: the sizes, and what transformers asks for."""
    kind = KINDS[model_type]
    return {
        "architectures": [kind.architecture],
        "model_type": model_type,
        **{key: value for key, value in asdict(config).items() if value is not None},
        **kind.says,
        "initializer_range": 0.02,
        **special_tokens(config),
        "torch_dtype": "float32",
    }


def special_tokens(config):
    """Our tokenizers have one special token, the last one. It is the padding, too: transformers' batches need one."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.vocab_size - 1)


def config_from_dict(raw, families, where):
    """The config object of a config.json's content. Raises UserError that names `where` and what we do not have."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise UserError(f"{where}: model_type {reprlib.repr(model_type)} is not supported, only "
                        f"{' and '.join(families)} are")
    kind, raw = KINDS[model_type], {key: value for key, value in raw.items() if value is not None}
    for key, allowed in kind.needs.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} = {reprlib.repr(raw[key])} is not supported, only {allowed[0]!r} is")
    if "quantization_config" in raw:
        raise UserError(f"{where}: quantization_config is not supported: use the unquantized weights")
    # transformers 5 keeps theta inside rope_parameters, 4 has it beside rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(raw.get("architectures", []), list):
        raise UserError(f"{where}: rope_parameters must be an object, and architectures a list")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
        raise UserError(f"{where}: rope_scaling {reprlib.repr(rope)} is not supported, only the default rotary "
                        "embedding is")
    if model_type == "llama":
        raw = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6, **raw}  # HF's defaults
        raw.update({key: rope[key] for key in ("rope_theta",) if key in rope})
    if missing := [key for key in kind.sizes if key not in raw]:
        raise UserError(f"{where}: {missing[0]} is missing: this is not a whole config.json")
    config_class = families[model_type][0]
    config = config_class(**{f.name: raw[f.name] for f in fields(config_class) if f.name in raw})
    check_ranges(config, kind, where)
    return config


def check_ranges(config, kind, where):
    """Raise UserError that names `where` and the first field of a config object that no model can have."""
    sizes = {name: value for name, value in vars(config).items() if value is not None}  # None: from the others
    for name, value in sizes.items():
        types, least, most = RANGES[name]
        if type(value) not in types or not least <= value <= most:
            kind_of_number = types[-1].__name__
            raise UserError(f"{where}: {name} = {reprlib.repr(value)} is no {kind_of_number} from {least} to {most}")
    name, unit = kind.multiple
    if sizes[name] % sizes[unit]:
        raise UserError(f"{where}: {name} = {sizes[name]} is no multiple of {unit} = {sizes[unit]}")
    if "rope_theta" in sizes:  # the rotary embedding turns pairs of a head's dimensions
        size = sizes.get("head_dim", sizes["hidden_size"] / sizes["num_attention_heads"])
        if size % 2:
            raise UserError(f"{where}: a head has {size:g} dimensions, which must be an even number")


# ---- folders -------------------------------------------------------------------------------------------------------


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Licence: to be named by the owner.
"""


def save_folder(folder, model, title="A language model", facts=()):
    """Write what transformers and load_folder open: config.json, generation_config.json, model.safetensors, README.md.

    title, facts: the heading and the lines of the model card. Every rank calls this, and rank 0 writes.
    """
    folder = Path(folder)
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", config_to_dict(model.config, model.model_type))
        write_json(folder / "generation_config.json", {**special_tokens(model.config), "do_sample": True,
                                                       "temperature": 0.8, "top_k": 50})
        if not (folder / "README.md").exists():  # its owner may have filled it in
            with atomic(folder / "README.md") as file:
                file.write(CARD.format(title=title, facts="\n".join(f"- {fact}" for fact in facts)).encode())
    save_safetensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})


def load_folder(folder, families):
    """Open a release, or any plain Hugging Face GPT-2 or LLaMA folder, as a model in fp32 on the CPU.

    Raises UserError where the folder is none, needs what we do not have, or lacks or adds a tensor.
    """
    folder = Path(folder)
    with disk_errors(folder):
        if not folder.exists():
            raise UserError(f"there is no folder {folder}: a run writes its release at its end, and names are not "
                            "fetched from a hub; give a folder such as out/release")
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UserError(f"{folder} is a PEFT adapter: merge it into its model first (merge_and_unload)")
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} is no model folder (it has no config.json): name one such as out/release")
    config = config_from_dict(read_json(folder / "config.json"), families, folder / "config.json")
    model_class = next(model for kind, model in families.values() if kind is type(config))
    with torch.device("meta"):
        model = model_class(config)
    wanted = dict(model.named_parameters())

    tensors, prefix = {}, KINDS[model.model_type].prefix
    for name, tensor in read_tensors(folder).items():
        if name not in wanted and prefix + name in wanted:  # a bare GPT2Model or LlamaModel was saved
            name = prefix + name
        if not name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):  # constants of old versions
            tensors[name] = tensor
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing in all): is it a whole model?")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{folder} holds the tensor {extra[0]} ({len(extra)} in all) that this model has no place for")
    for name, p in wanted.items():
        if p.shape != tensors[name].shape:
            raise UserError(f"{folder}: {name} is {list(tensors[name].shape)}, config.json says {list(p.shape)}")
        if not tensors[name].is_floating_point():
            raise UserError(f"{folder}: {name} is of {tensors[name].dtype}: weights are floating-point numbers")
    model.to_empty(device="cpu")
    model.tie()
    for name, p in model.named_parameters():
        assign(p, tensors[name])
    return model


def read_tensors(folder):
    """All tensors of a folder's safetensors files, one or several with an index.

    Raises UserError where one of them is missing, damaged or outside of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_safetensors(folder / "model.safetensors")[0]
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise UserError(f"{index} needs a weight_map, from tensors to files of this folder: restore it from a copy")
    tensors = {}
    for name in sorted(set(names)):
        tensors.update(load_safetensors(folder / name)[0])
    return tensors
