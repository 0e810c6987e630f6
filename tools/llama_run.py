"""llama.cpp as an oracle of whole models: logits and every activation, through the C API in the xllamacpp wheel.

python -m tools.llama_run model.gguf 3,1,4 trace.safetensors     # an activation trace that `compare` reads
"""

import ctypes as c
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.ggml import LIBRARY, VERSION

_KINDS = {"f32": 0, "f16": 1, "q8_0": 8}
_P, _B, _I, _U, _F = c.c_void_p, c.c_bool, c.c_int32, c.c_uint32, c.c_float


def _struct(name: str, *fields: tuple[str, Any]) -> type[c.Structure]:
    return type(name, (c.Structure,), {"_fields_": list(fields)})


# include/llama.h and ggml.h in xllamacpp 2026.10.11549; `_defaults` checks that the library agrees
ModelParams = _struct(
    "ModelParams", ("devices", _P), ("overrides", _P), ("n_gpu_layers", _I), ("split_mode", _I), ("load_mode", _I),
    ("lazy_mode", _I), ("main_gpu", _I), ("tensor_split", _P), ("progress", _P), ("progress_data", _P),
    ("kv_overrides", _P), ("vocab_only", _B), ("check_tensors", _B), ("use_extra_bufts", _B), ("no_host", _B),
    ("no_alloc", _B), ("load_mtp", _B),
)  # fmt: skip
ContextParams = _struct(
    "ContextParams", ("n_ctx", _U), ("n_batch", _U), ("n_ubatch", _U), ("n_seq_max", _U), ("n_rs_seq", _U),
    ("n_outputs_max", _U), ("n_outputs_max_per_seq", _U), ("n_threads", _I), ("n_threads_batch", _I),
    ("ctx_type", _I), ("rope_scaling_type", _I), ("pooling_type", _I), ("attention_type", _I),
    ("flash_attn_type", _I), ("rope_freq_base", _F), ("rope_freq_scale", _F), ("yarn_ext_factor", _F),
    ("yarn_attn_factor", _F), ("yarn_beta_fast", _F), ("yarn_beta_slow", _F), ("yarn_orig_ctx", _U),
    ("defrag_thold", _F), ("cb_eval", _P), ("cb_eval_data", _P), ("type_k", _I), ("type_v", _I),
    ("moe_cache_size", c.c_size_t), ("abort", _P),
    ("abort_data", _P), ("embeddings", _B), ("offload_kqv", _B), ("no_perf", _B), ("op_offload", _B),
    ("swa_full", _B), ("kv_unified", _B), ("samplers", _P), ("n_samplers", c.c_size_t), ("ctx_other", _P),
)  # fmt: skip
Batch = _struct(
    "Batch", ("n_tokens", _I), ("token", c.POINTER(_I)), ("embd", _P), ("pos", c.POINTER(_I)),
    ("n_seq_id", c.POINTER(_I)), ("seq_id", c.POINTER(c.POINTER(_I))), ("logits", c.POINTER(c.c_int8)),
)  # fmt: skip
Tensor = _struct(
    "Tensor", ("type", _I), ("buffer", _P), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4), ("op", _I),
    ("op_params", _I * 16), ("flags", _I), ("src", _P * 10), ("view_src", _P), ("view_offs", c.c_size_t),
    ("data", _P), ("name", c.c_char * 64),
)  # fmt: skip
_Callback = c.CFUNCTYPE(_B, c.POINTER(Tensor), _B, _P)
_Log = c.CFUNCTYPE(None, _I, c.c_char_p, _P)
_quiet = _Log(lambda level, text, data: None)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function


def _defaults() -> tuple[Any, Any]:
    """The library's own defaults; its structures must be as long as ours, and hold what is known of them."""
    model = _function("llama_model_default_params", ModelParams)()
    context = _function("llama_context_default_params", ContextParams)()
    known = (context.n_batch, context.n_ubatch, context.type_k, context.type_v, context.offload_kqv)
    if known != (2048, 512, 1, 1, True) or not model.use_extra_bufts:
        raise RuntimeError(f"{VERSION}: llama.h's structures are not those of 2026.10.11549: {known}")
    return model, context


class Product(NamedTuple):
    """One product with a matrix as llama.cpp computed it: what went in and what came out, on ggml's four axes.

    chosen : of a product with experts' matrices, which expert each row takes
    """

    name: str
    weight: str
    inputs: NDArray[Any]
    outputs: NDArray[Any]
    chosen: NDArray[Any] | None


def _copy(tensor: Any) -> NDArray[Any]:
    """The values of an f32 or i32 tensor, whatever its strides."""
    dtype = np.float32 if tensor.type == 0 else np.int32
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 4
    raw = np.frombuffer((c.c_uint8 * last).from_address(tensor.data), np.uint8)
    return np.lib.stride_tricks.as_strided(raw[:4].view(dtype), shape, strides).copy()


class Llama:
    """One model and one context of llama.cpp, on CPU threads, without flash attention.

    kv     : type of the caches
    watch  : keep every activation: `seen` then holds (name, value) in the order of evaluation, and `products` every
             product of float32 inputs with a matrix of the file
    """

    def __init__(
        self, path: Path | str, context: int = 512, kv: str = "f32", threads: int = 1, watch: bool = False,
        repack: bool = False, batch: int | None = None,
    ) -> None:  # fmt: skip
        _function("llama_log_set", None, _Log, _P)(_quiet, None)
        model, params = _defaults()
        model.use_extra_bufts = repack  # repacked and AMX buffers crash on this architecture
        self._model = _function("llama_model_load_from_file", _P, c.c_char_p, ModelParams)(
            str(path).encode(), model
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            context,
            context,
            batch or context,
            1,
        )
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.type_k, params.type_v = 0, _KINDS[kv], _KINDS[kv]
        self.seen: list[tuple[str, NDArray[Any]]] = []
        self.products: list[Product] = []
        self._callback = _Callback(self._listen)
        if watch:
            params.cb_eval = c.cast(self._callback, _P)
        self._context = _function("llama_init_from_model", _P, _P, ContextParams)(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        vocab = _function("llama_model_get_vocab", _P, _P)(self._model)
        self.vocab = int(_function("llama_vocab_n_tokens", _I, _P)(vocab))
        self.past = 0

    def decode(self, tokens: Sequence[int], last: bool = False) -> NDArray[np.float32]:
        """Logits [T, V] of the tokens that follow those before; [1, V] of the last alone."""
        n = len(tokens)
        ids, places, counts = (
            (_I * n)(*tokens),
            (_I * n)(*range(self.past, self.past + n)),
            (_I * n)(*[1] * n),
        )
        zero = (_I * 1)(0)
        sequences = (c.POINTER(_I) * n)(*[c.cast(zero, c.POINTER(_I))] * n)
        wanted = (c.c_int8 * n)(*[0 if last else 1] * (n - 1), 1)
        batch = Batch(n, ids, None, places, counts, sequences, wanted)
        if _function("llama_decode", _I, _P, Batch)(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self.past += n
        got = _function("llama_get_logits", c.POINTER(_F), _P)(self._context)
        return np.ctypeslib.as_array(got, (1 if last else n, self.vocab)).copy()

    def clear(self) -> None:
        """Forget all tokens."""
        memory = _function("llama_get_memory", _P, _P)(self._context)
        _function("llama_memory_clear", None, _P, _B)(memory, True)
        self.past = 0

    def close(self) -> None:
        """Give the memory back."""
        _function("llama_free", None, _P)(self._context)
        _function("llama_model_free", None, _P)(self._model)

    def _listen(self, pointer: Any, ask: bool, data: Any) -> bool:
        tensor = pointer.contents
        if ask or tensor.type not in (0, 26):  # f32, i32
            return True
        value = _copy(tensor)
        self.seen.append((tensor.name.decode(errors="replace"), value))
        operation = _function("ggml_op_name", c.c_char_p, _I)(tensor.op)
        if operation in (b"MUL_MAT", b"MUL_MAT_ID"):
            weight, inputs, chosen = (
                c.cast(source, c.POINTER(Tensor)).contents if source else None for source in tensor.src[:3]
            )
            if inputs.type == 0 and weight.name.endswith(b".weight"):
                ids = None if operation == b"MUL_MAT" else _copy(chosen)
                names = tensor.name.decode(), weight.name.decode()
                self.products.append(Product(*names, _copy(inputs), value, ids))
        return True


if __name__ == "__main__":
    from safetensors.numpy import save_file

    llama = Llama(sys.argv[1], watch=True)
    llama.decode([int(t) for t in sys.argv[2].split(",")])
    for name, value in llama.seen:
        print(name, value.shape, value.dtype)
    save_file({f"{i:04}.{name}": value for i, (name, value) in enumerate(llama.seen)}, sys.argv[3])
