"""Which programs run a checkpoint, why not, and the command for each; from its config alone.

Depthcut's tests run transformers, torchao and llama.cpp; every other row follows that program's
documentation.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.checkpoint import traits
from core.checkpoint.own_code import MODELLING
from core.checkpoint.traits import Traits

Answer = Literal["yes", "with code", "no"]
PLACEHOLDER = "PATH_OF_THIS_FOLDER"
"""Stands for the folder in a model card, which is moved together with it."""
TESTED, DOCUMENTED = "tested", "documented"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank."""


@dataclass(frozen=True)
class Row:
    """One program, and whether it runs the checkpoint."""

    engine: str
    runs: Answer
    why: str
    command: str = ""
    """What to type, or Python code; empty if the answer is no."""
    basis: str = DOCUMENTED
    """What the answer rests on: `TESTED` or `DOCUMENTED`."""

    @property
    def language(self) -> str:
        """Language of the command, for highlighting."""
        return "python" if "import" in self.command.split() else "bash"


def rows(
    config: Mapping[str, Any],
    folder: str = PLACEHOLDER,
    *,
    trusted: bool = True,
    refused: str | None = None,
) -> tuple[Row, ...]:
    """Return every program for a checkpoint.

    Args:
        config: Its config.json.
        folder: Its folder, as the commands name it.
        trusted: The modelling code beside the weights is the file that Depthcut wrote.
        refused: Why the export to GGUF refuses it, which also depends on its tokenizer and rotary
            scaling; empty if it does not, None if that has not been checked.
    """
    found = traits.of(config)
    path = shlex.quote(folder)
    return (
        _transformers(found, folder, trusted),
        *_gguf(found, path, refused),
        *_servers(found, path),
        *_quantizers(found, path, folder),
        *_others(found, path),
    )


def of_adapter(base: Mapping[str, Any], folder: str, adapter: str, rank: int) -> tuple[Row, ...]:
    """Return every program for a LoRA adapter beside its base checkpoint in ``folder``.

    ``base`` is that checkpoint's config.json, ``rank`` the adapter's.
    """
    found = traits.of(base)
    trust = ", trust_remote_code=True" if found.unusual else ""
    stock = _transformers(found, folder, trusted=True)
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)}{trust})\n"
        f"model = PeftModel.from_pretrained(model, {json.dumps(adapter)})"
    )
    why = f"peft adds the adapter to its base checkpoint. {stock.why}"
    result = [replace(stock, engine="transformers with peft", why=why, command=code)]
    merge = "It does not read adapters. Merge it into the weights first."
    wide = next((size for size in _RANKS if size >= rank), rank)
    path, beside = shlex.quote(folder), shlex.quote(adapter)
    commands = {
        "vLLM": f"vllm serve {path} --enable-lora --max-lora-rank {wide} "
        f"--lora-modules retrained={beside}",
        "SGLang": f"python -m sglang.launch_server --model-path {path} "
        f"--lora-paths retrained={beside}",
    }
    for row in rows(base, folder)[1:]:
        command = commands.get(row.engine)
        if row.runs == "no":
            result.append(row)
        elif command:
            result.append(replace(row, why=f"It serves base and adapter. {row.why}",
                                  command=command))  # fmt: skip
        else:
            result.append(Row(row.engine, "no", merge, basis=row.basis))
    return tuple(result)


# ------------------------------------------------------------------------------------- the programs


def _transformers(found: Traits, folder: str, trusted: bool) -> Row:
    name = json.dumps(folder)
    runs: Answer = "yes"
    why, trust = f"Its stock {found.family.label} classes read it.", ""
    if found.unusual:
        runs = "with code"
        why = f"{_sentence(found.unusual)}: {MODELLING.name}, beside the weights, is needed."
        trust = ", trust_remote_code=True"
        if not trusted:
            why += " The file there is not the one that Depthcut writes; read it before you use it."
            trust = ""
    elif found.own_head_dim:
        why += f" config.json gives the width of a head ({found.head_dim})."
    if found.quantized:
        why += f" The weights are {found.quantized}: torchao must be installed."
    command = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})"
    )
    return Row("transformers", runs, why, command, TESTED)


def _gguf(found: Traits, path: str, refused: str | None) -> Iterator[Row]:
    """Yield llama.cpp and Ollama, which both read GGUF files."""
    names = (("llama.cpp", TESTED), ("Ollama", DOCUMENTED))
    problem = refused or ("" if found.architecture else found.why_architecture)
    if found.quantized:
        problem = _unquantized(found)
    if problem:
        for name, basis in names:
            yield Row(name, "no", problem, basis=basis)
        return
    why = f"As architecture {found.architecture}"
    why += f": {found.why_architecture}." if found.why_architecture else "."
    if refused is None:
        why += (
            " The export refuses tokenizers and rotary scaling that it would compute differently."
        )
    export = f"python -m core export {path} --format gguf --type q8_0 --out model.gguf"
    runs = {
        "llama.cpp": "llama-server -m model.gguf",
        "Ollama": 'echo "FROM ./model.gguf" > Modelfile\n'
        "ollama create pruned -f Modelfile\nollama run pruned",
    }
    for name, basis in names:
        why = why if name == "llama.cpp" else "It reads the same GGUF file."
        yield Row(name, "yes", why, f"{export}\n{runs[name]}", basis)


def _servers(found: Traits, path: str) -> Iterator[Row]:
    commands = {
        "vLLM": (f"vllm serve {path}", " --tensor-parallel-size"),
        "SGLang": (f"python -m sglang.launch_server --model-path {path}", " --tp"),
    }
    for name, (command, flag) in commands.items():
        if problem := _stock_problem(found, name):
            yield Row(name, "no", problem)
            continue
        why = f"Its {found.family.label} class reads it"
        why += f", with the width of a head ({found.head_dim})." if found.own_head_dim else "."
        several = found.parallel[1:]
        if several:
            why += f" On several GPUs,{flag} can be {_either(several)}."
        else:
            why += " Its heads and widths cannot be divided among several GPUs."
        yield Row(name, "yes", why, command)


def _quantizers(found: Traits, path: str, folder: str) -> Iterator[Row]:
    """Yield torchao, through ``quantize``, and GPTQ."""
    gptq = "GPTQ (llm-compressor)"
    if found.quantized:
        again = f"The weights are {found.quantized} already."
        yield Row("torchao", "no", again, basis=TESTED)
        yield Row(gptq, "no", again)
        return
    group = found.group
    four = f"4 bits in groups of {group}" if group else "4 bits need a group, and none fits"
    why = f"8 bits fit every width; {four}.{_uneven(found)}"
    bits = 4 if group and group >= 32 else 8
    command = f"python -m core quantize {path} --bits {bits} --out quantized"
    yield Row("torchao", "yes", why, command, TESTED)
    divides = group == traits.GROUPS[0]
    trust = ", trust_remote_code_model=True" if found.unusual else ""
    code = (
        "from llmcompressor import oneshot\n"
        "from llmcompressor.modifiers.quantization import GPTQModifier\n\n"
        f'recipe = GPTQModifier(targets="Linear", scheme="{"W4A16" if divides else "W8A16"}", '
        'ignore=["lm_head"])\n'
        f'oneshot(model={json.dumps(folder)}{trust}, dataset="open_platypus", recipe=recipe,\n'
        '        output_dir="quantized", num_calibration_samples=512, max_seq_length=2048)'
    )
    why = f"W4A16 needs widths that are multiples of {traits.GROUPS[0]}"
    why += ", as they are here." if divides else "; W8A16 does not."
    if found.unusual:
        why += " It has to trace the code beside the weights, and vLLM cannot load the result."
    yield Row(gptq, "with code" if found.unusual else "yes", why, code)


def _uneven(found: Traits) -> str:
    """Return a sentence on MLP widths that kernels are slow with; empty without."""
    odd = sorted({b.neurons for b in found.blocks if b.neurons % 128})
    if not odd:
        return ""
    some = ", ".join(f"{width:,}" for width in odd[:3]) + (", ..." if odd[3:] else "")
    return f" Kernels are fastest with MLP widths that are multiples of 128; here: {some}."


def _others(found: Traits, path: str) -> Iterator[Row]:
    commands = {
        "MLX": f'mlx_lm.generate --model {path} --prompt "Once upon a time"',
        "ONNX Runtime GenAI": f"python -m onnxruntime_genai.models.builder -i {path} "
        "-o onnx_model -p int4 -e cpu",
        "OpenVINO": f"optimum-cli export openvino --model {path} openvino_model",
        "CTranslate2": f"ct2-transformers-converter --model {path} --output_dir ct2_model",
    }
    for name, command in commands.items():
        if problem := _stock_problem(found, name):
            yield Row(name, "no", problem)
        else:
            yield Row(name, "yes", f"It reads {found.family.label} checkpoints.", command)


def _stock_problem(found: Traits, engine: str) -> str:
    """Return why a program with one class per family does not run the model; empty if it does."""
    if found.quantized:
        return _unquantized(found)
    if found.unusual:
        return f"{_sentence(found.unusual)}, which no class of {engine} supports."
    if found.family.name == "qwen2" and found.own_head_dim:
        usual = found.hidden // found.blocks[0].heads
        if engine in ("vLLM", "SGLang", "MLX"):
            return (
                f"Its Qwen2 class computes the width of a head as hidden size / heads ({usual}); "
                f"here it is {found.head_dim}."
            )
        if engine == "CTranslate2":
            return f"It does not document a width of a head ({found.head_dim}) for Qwen2."
    return ""


def _unquantized(found: Traits) -> str:
    return (
        f"The {found.quantized} weights are stored for transformers with torchao. Give it "
        "the unquantized checkpoint instead."
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _either(sizes: Sequence[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last
