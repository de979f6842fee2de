"""A product of float32 matrices on one thread: for small ones, where what a library does around the arithmetic takes as long.

Its kernel holds a block of the result in the processor's registers while it goes along the inner dimension, with as many rows
as hide the time that a multiplication takes. Nothing is packed: the right operand lies by rows. Code for a graph calls it as it
calls its own loops.

Source: Goto and van de Geijn, *Anatomy of high-performance matrix multiplication*, 2008.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["LEAST_COLUMNS", "is_faster", "seconds"]

LEAST_COLUMNS = 16
"""Of the right operand."""

# Columns come in vectors of WIDTH; the last ones go back over some that are done.
_SOURCE = r"""
#include <algorithm>
#include <cstdint>

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 5, MOST = 4;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 4, MOST = 3;
#else
constexpr int WIDTH = 4, ROWS = 4, MOST = 4;
#endif
constexpr int64_t DEPTH = 256;  // of the inner dimension, as much as stays in the processor's cache

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

struct Sizes {
  int64_t M, K, N, row, column, ldb;  // entry (i, k) of the left operand lies at i * row + k * column
};

// R rows of C vectors each, added to what is there already if so said: in parts, whose roundings do not add up.
template <int R, int C>
static inline void block(const float* a, const float* b, float* c, const Sizes& s, int64_t from, int64_t to) {
  Vector sum[R][C] = {};
  for (int64_t k = from; k < to; ++k) {
    Vector of_b[C];
    for (int j = 0; j < C; ++j) of_b[j] = *(const Vector*)(b + k * s.ldb + WIDTH * j);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) sum[i][j] += a[i * s.row + k * s.column] * of_b[j];
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) {
      Vector* there = (Vector*)(c + i * s.N + WIDTH * j);
      *there = from > 0 ? *there + sum[i][j] : sum[i][j];
    }
}

template <int R, int C>
static void rest(const float* a, const float* b, float* c, const Sizes& s, int64_t rows, int64_t from, int64_t to) {
  if constexpr (R > 0) {
    if (rows == R) block<R, C>(a, b, c, s, from, to);
    else rest<R - 1, C>(a, b, c, s, rows, from, to);
  }
}

template <int C>
static void columns(const float* a, const float* b, float* c, const Sizes& s) {
  for (int64_t from = 0; from == 0 || from < s.K; from += DEPTH) {
    const int64_t to = std::min(from + DEPTH, s.K);
    int64_t m = 0;
    for (; m + ROWS <= s.M; m += ROWS) block<ROWS, C>(a + m * s.row, b, c + m * s.N, s, from, to);
    rest<ROWS - 1, C>(a + m * s.row, b, c + m * s.N, s, s.M - m, from, to);
  }
}

extern "C" void kernel(const float* a, const float* b, float* c, int64_t M, int64_t K, int64_t N, int64_t row, int64_t column,
                       int64_t ldb) {
  const Sizes sizes{M, K, N, row, column, ldb};
  for (int64_t n = 0; n < N;) {
    int64_t vectors = std::min<int64_t>(MOST, (N - n + WIDTH - 1) / WIDTH);
    if (vectors * WIDTH > N) --vectors;
    const int64_t start = std::min<int64_t>(n, N - vectors * WIDTH);
    switch (vectors) {
      case 1: columns<1>(a, b + start, c + start, sizes); break;
      case 2: columns<2>(a, b + start, c + start, sizes); break;
      case 3: columns<3>(a, b + start, c + start, sizes); break;
      default: columns<MOST>(a, b + start, c + start, sizes);
    }
    n = start + vectors * WIDTH;
  }
}
"""

_LOCK = threading.Lock()

torch.library.define("pyro_seq::blocked_product", "(Tensor left, Tensor right) -> Tensor")


@torch.library.impl("pyro_seq::blocked_product", "CPU")
def _product(left: Tensor, right: Tensor) -> Tensor:
    out = _form(left, right)
    _installed()(left, right, out, left.shape[0], *right.shape, *left.stride(), right.stride(0))
    return out


@torch.library.register_fake("pyro_seq::blocked_product")
def _form(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


@cache
def is_faster(rows: int, width: int) -> bool:
    """Whether there is such a kernel here, which at such a size takes at most three quarters of the time of torch's product."""
    try:
        with _LOCK:
            kernel = _installed()
    except Exception:  # no compiler, or an Inductor that is made otherwise
        return False
    a, b, out = (torch.ones(count, width, dtype=torch.float32, device="cpu") for count in (rows, width, rows))
    return 4 * seconds(lambda: kernel(a, b, out, rows, width, width, width, 1, width)) < 3 * seconds(
        lambda: torch.mm(a, b, out=out))


@cache
def _installed() -> Callable[..., None]:
    """Compile the kernel, and have Inductor call it for the operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about torch
        from torch._inductor import config, ir
        from torch._inductor.codecache import CppPythonBindingsCodeCache
        from torch._inductor.lowering import register_lowering
        from torch._inductor.select_algorithm import ExternKernelChoice

    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):  # a multiplication and an addition at once
        kernel = CppPythonBindingsCodeCache.load_pybinding(["const float*"] * 2 + ["float*"] + ["int64_t"] * 6, _SOURCE)

    # Machine code on disk asks for it by this name, and with these arguments.
    def pyro_seq_blocked_product(left: Tensor, right: Tensor, *, sizes: tuple[int, ...], out: Tensor) -> None:
        kernel(left, right, out, *sizes)

    choice = ExternKernelChoice(pyro_seq_blocked_product)

    @register_lowering(torch.ops.pyro_seq.blocked_product.default, type_promotion_kind=None)
    def lower(left: Any, right: Any) -> Any:
        left, right = ir.ExternKernel.realize_input(left), ir.ExternKernel.realize_input(right)
        right = ir.ExternKernel.require_stride_order(right, [1, 0])
        if right.get_stride()[1] != 1:
            right = ir.ExternKernel.copy_input(right)
        left.freeze_layout()
        (rows, inner), columns = map(int, left.get_size()), int(right.get_size()[1])
        layout = ir.FixedLayout(left.get_device(), left.get_dtype(), [rows, columns])
        sizes = (rows, inner, columns, *map(int, left.get_stride()), int(right.get_stride()[0]))
        return choice.bind([left, right], layout, sizes=sizes).output_node()

    return kernel


def seconds(fn: Callable[[], Any]) -> float:
    """The shortest time of several calls."""
    found = []
    for _ in range(8):
        start = time.perf_counter()
        fn()
        found.append(time.perf_counter() - start)
    return min(found)
