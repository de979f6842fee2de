"""A product of float32 matrices of few rows, for which what a library does around the arithmetic takes as long as it.

Its kernel holds a block of the result in the processor's registers while it goes along the inner dimension, with as many rows
as hide the time that a multiplication takes. Code for a graph calls it as it calls its own loops.

Source: Goto and van de Geijn, *Anatomy of high-performance matrix multiplication*, 2008.
"""

from __future__ import annotations

import time
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

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

template <int R, int C>
static inline void block(const float* a, const float* b, float* c, int64_t K, int64_t lda, int64_t ldb, int64_t ldc) {
  Vector sum[R][C] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector of_b[C];
    for (int j = 0; j < C; ++j) of_b[j] = *(const Vector*)(b + k * ldb + WIDTH * j);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) sum[i][j] += a[i * lda + k] * of_b[j];
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) *(Vector*)(c + i * ldc + WIDTH * j) = sum[i][j];
}

template <int R, int C>
static void rest(const float* a, const float* b, float* c, int64_t m, int64_t K, int64_t lda, int64_t ldb, int64_t ldc) {
  if constexpr (R > 0) {
    if (m == R) block<R, C>(a, b, c, K, lda, ldb, ldc);
    else rest<R - 1, C>(a, b, c, m, K, lda, ldb, ldc);
  }
}

template <int C>
static void columns(const float* a, const float* b, float* c, int64_t M, int64_t K, int64_t lda, int64_t ldb, int64_t ldc) {
  int64_t m = 0;
  for (; m + ROWS <= M; m += ROWS) block<ROWS, C>(a + m * lda, b, c + m * ldc, K, lda, ldb, ldc);
  rest<ROWS - 1, C>(a + m * lda, b, c + m * ldc, M - m, K, lda, ldb, ldc);
}

extern "C" void kernel(const float* a, const float* b, float* c, int64_t M, int64_t K, int64_t N, int64_t lda, int64_t ldb) {
  for (int64_t n = 0; n < N;) {
    int64_t vectors = std::min<int64_t>(MOST, (N - n + WIDTH - 1) / WIDTH);
    if (vectors * WIDTH > N) --vectors;
    const int64_t start = std::min<int64_t>(n, N - vectors * WIDTH);
    const float* from = b + start;
    float* to = c + start;
    switch (vectors) {
      case 1: columns<1>(a, from, to, M, K, lda, ldb, N); break;
      case 2: columns<2>(a, from, to, M, K, lda, ldb, N); break;
      case 3: columns<3>(a, from, to, M, K, lda, ldb, N); break;
      default: columns<MOST>(a, from, to, M, K, lda, ldb, N);
    }
    n = start + vectors * WIDTH;
  }
}
"""

torch.library.define("pyro_seq::small_product", "(Tensor left, Tensor right) -> Tensor")


@torch.library.impl("pyro_seq::small_product", "CPU")
def _product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


@torch.library.register_fake("pyro_seq::small_product")
def _form(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


@cache
def is_faster() -> bool:
    """Whether there is such a kernel here, and it takes at most three quarters of the time of torch's product."""
    try:
        kernel = _installed()
    except Exception:  # no compiler, or an Inductor that is made otherwise
        return False
    a, b, out = (torch.ones(rows, 128, dtype=torch.float32, device="cpu") for rows in (20, 128, 20))
    return seconds(lambda: kernel(a, b, out, 20, 128, 128, 128, 128)) * 4 < seconds(lambda: torch.mm(a, b, out=out)) * 3


def _installed() -> Callable[..., None]:
    """Compile the kernel, and have Inductor call it for the operator."""
    from torch._inductor import config, ir
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.lowering import register_lowering
    from torch._inductor.select_algorithm import ExternKernelChoice

    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):  # a multiplication and an addition at once
        kernel = CppPythonBindingsCodeCache.load_pybinding(["const float*"] * 2 + ["float*"] + ["int64_t"] * 5, _SOURCE)

    # Machine code on disk asks for it by this name, and with these arguments.
    def pyro_seq_small_product(left: Tensor, right: Tensor, *, m: int, k: int, n: int, lda: int, ldb: int, out: Tensor) -> None:
        kernel(left, right, out, m, k, n, lda, ldb)

    choice = ExternKernelChoice(pyro_seq_small_product)

    def by_rows(value: Any) -> Any:
        value = ir.ExternKernel.require_stride_order(ir.ExternKernel.realize_input(value), [1, 0])
        return value if value.get_stride()[1] == 1 else ir.ExternKernel.copy_input(value)

    @register_lowering(torch.ops.pyro_seq.small_product.default, type_promotion_kind=None)
    def lower(left: Any, right: Any) -> Any:
        left, right = by_rows(left), by_rows(right)
        (m, k), n = map(int, left.get_size()), int(right.get_size()[1])
        layout = ir.FixedLayout(left.get_device(), left.get_dtype(), [m, n])
        lda, ldb = (int(value.get_stride()[0]) for value in (left, right))
        return choice.bind([left, right], layout, m=m, k=k, n=n, lda=lda, ldb=ldb).output_node()

    return kernel


def seconds(fn: Callable[[], Any]) -> float:
    """The shortest time of several calls."""
    found = []
    for _ in range(8):
        start = time.perf_counter()
        fn()
        found.append(time.perf_counter() - start)
    return min(found)
