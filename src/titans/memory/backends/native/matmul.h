// Small matrix products with a vector along the last, contiguous dimension, which is padded to whole vectors.
// What happens to a finished tile is the caller's: sums, scaling and stores are fused into the product.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

#include "tiles.h"

namespace titans {

template <bool kTransposed, int kRows, int kVectors, class T, class Finish>
[[gnu::always_inline]] inline void tile(
    int i, int j, int depth, const T* a, std::ptrdiff_t lda, const T* b, std::ptrdiff_t ldb,
    const Finish& finish) {
  Vector<T> sum[kRows][kVectors] = {};
  // Rows of A by fours, so that their addresses need few registers.
  constexpr int kFours = kTransposed ? 1 : (kRows + 3) / 4;
  const T* left[kFours];
  for (int f = 0; f < kFours; ++f) left[f] = a + (kTransposed ? i : (i + 4 * f) * lda);
  std::ptrdiff_t thrice = 3 * lda;
  asm("" : "+r"(lda), "+r"(thrice));
  b += j;
  for (int k = 0; k < depth; ++k) {
    Vector<T> right[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) right[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T* four = left[kTransposed ? 0 : r / 4];
      const T factor = kTransposed ? four[r] : r % 4 == 3 ? four[thrice] : four[(r % 4) * lda];
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[r][n] += factor * right[n];
    }
#pragma GCC unroll 8
    for (int f = 0; f < kFours; ++f) left[f] += kTransposed ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) finish(i + r, j + n * kLanes<T>, sum[r][n]);
}

template <bool kTransposed, int kVectors, class T, class Finish>
inline void panel(
    int rows, int j, int depth, const T* a, std::ptrdiff_t lda, const T* b, std::ptrdiff_t ldb,
    const Finish& finish) {
  // Four vectors a row: sums in three quarters of the registers, so that each of B is loaded for six rows.
  constexpr int kTall = (kAccumulators >= 16 && kVectors == 4 ? 24 : kAccumulators) / kVectors;
  constexpr int kShort = kTall > 4 ? 4 : 1;
  // Eight rows are twice four rather than six and two.
  const auto tall = [&](int left) { return left >= kTall && (kTall % kShort == 0 || left != 2 * kShort); };
  int i = 0;
  for (; tall(rows - i); i += kTall) tile<kTransposed, kTall, kVectors>(i, j, depth, a, lda, b, ldb, finish);
  for (; i + kShort <= rows; i += kShort)
    tile<kTransposed, kShort, kVectors>(i, j, depth, a, lda, b, ldb, finish);
  for (; i < rows; ++i) tile<kTransposed, 1, kVectors>(i, j, depth, a, lda, b, ldb, finish);
}

// finish(i, j, v): v holds Σ_k op(A)[i, k] B[k, j … j + lanes), for each i < rows and j < columns.
// A is (rows, depth), or (depth, rows) if transposed; B is (depth, columns), columns whole vectors.
template <bool kTransposed, class T, class Finish>
inline void product(
    int rows, int columns, int depth, const T* a, std::ptrdiff_t lda, const T* b, std::ptrdiff_t ldb,
    const Finish& finish) {
#ifdef TITANS_TILES
  if constexpr (std::is_same_v<T, float>)
    if (Tiles::mine) return Tiles::mine->product<kTransposed>(rows, columns, depth, a, lda, b, ldb, finish);
#endif
  constexpr int kWide = kAccumulators >= 16 ? 4 : 2;
  int j = 0;
  for (; j + kWide * kLanes<T> <= columns; j += kWide * kLanes<T>)
    panel<kTransposed, kWide>(rows, j, depth, a, lda, b, ldb, finish);
  if constexpr (kWide == 4)
    for (; j + 2 * kLanes<T> <= columns; j += 2 * kLanes<T>)
      panel<kTransposed, 2>(rows, j, depth, a, lda, b, ldb, finish);
  for (; j < columns; j += kLanes<T>) panel<kTransposed, 1>(rows, j, depth, a, lda, b, ldb, finish);
}

// The finishes that are needed more than once.
template <class T>
auto assign(T* c, int ldc) {
  return [=](int i, int j, Vector<T> sum) { store(c + std::ptrdiff_t(i) * ldc + j, sum); };
}
template <class T>
auto add(T* c, int ldc) {
  return [=](int i, int j, Vector<T> sum) {
    T* at = c + std::ptrdiff_t(i) * ldc + j;
    store(at, load(at) + sum);
  };
}
template <class T>
auto subtract(T* c, int ldc) {
  return [=](int i, int j, Vector<T> sum) {
    T* at = c + std::ptrdiff_t(i) * ldc + j;
    store(at, load(at) - sum);
  };
}

// (rows, columns) to (columns, rows).
template <class T>
inline void transpose(int rows, int columns, const T* from, int ld_from, T* to, int ld_to) {
  constexpr int kBlock = at::vec::Vectorized<T>::size();
  for (int i = 0; i < rows; i += kBlock)
    for (int j = 0; j < columns; j += kBlock)
      at::vec::transpose_mxn<T>(
          from + std::ptrdiff_t(i) * ld_from + j, ld_from, to + std::ptrdiff_t(j) * ld_to + i, ld_to,
          std::min(kBlock, rows - i), std::min(kBlock, columns - j));
}

}  // namespace titans
