// Products of float32 matrices rounded to bfloat16, with sums in float32, on the processor's matrix tiles (Intel AMX).
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "vector.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TITANS_TILES
#endif

namespace titans {

#ifndef TITANS_TILES

struct Tiles {
  explicit Tiles(bool) {}
  static bool allowed() { return false; }
};

#else

// While one lives with `wanted`, `product` of this thread rounds its operands and uses the tiles.
class Tiles {
 public:
  static inline thread_local Tiles* mine = nullptr;

  // Whether the system lets this process use them; it has to be asked once.
  static bool allowed() {
    constexpr long kAskPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
    return granted;
  }

  explicit Tiles(bool wanted) : wanted_(wanted) {
    if (!wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.rows[i] = kRows, shape.row_bytes[i] = 64;
    _tile_loadconfig(&shape);
    sums_.reserve(4 * kRows * kRows * sizeof(float));
    mine = this;
  }
  ~Tiles() {
    if (!wanted_) return;
    mine = nullptr;
    _tile_release();
  }
  Tiles(const Tiles&) = delete;

  // As titans::product.
  template <bool kTransposed, class Finish>
  void product(
      int rows, int columns, int depth, const float* a, std::ptrdiff_t lda, const float* b, std::ptrdiff_t ldb,
      const Finish& finish) {
    const int tall = (rows + kRows - 1) / kRows, wide = columns / kRows, deep = (depth + kDepth - 1) / kDepth;
    left_.reserve(std::ptrdiff_t(tall) * deep * kTileBytes), right_.reserve(std::ptrdiff_t(wide) * deep * kTileBytes);
    if constexpr (kTransposed)
      pack_transposed(rows, depth, deep, a, lda);
    else
      pack_rows(rows, depth, deep, a, lda);
    pack_columns(columns, depth, deep, b, ldb);
    barrier();
    int j = 0;
    for (; j + 2 <= wide; j += 2)
      for (int i = 0; i < tall; i += 2) {
        square(left(i, deep), left(std::min(i + 1, tall - 1), deep), right(j, deep), right(j + 1, deep), deep);
        for (int n = 0; n < 4 && i + n / 2 < tall; ++n) finish_tile(n, i + n / 2, j + n % 2, rows, finish);
      }
    for (int i = 0; j < wide && i < tall; i += 4) {
      const auto at = [&](int n) { return left(std::min(i + n, tall - 1), deep); };
      column(at(0), at(1), at(2), at(3), right(j, deep), deep);
      for (int n = 0; n < 4 && i + n < tall; ++n) finish_tile(n, i + n, j, rows, finish);
    }
  }

 private:
  // A tile: 16 rows of 32 bfloat16 on the left; 16 pairs of rows, interleaved, of 16 columns on the right.
  static constexpr int kRows = 16, kDepth = 32, kTileBytes = 1024;

  struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> block{nullptr, &std::free};
    std::ptrdiff_t size = 0;
    void reserve(std::ptrdiff_t bytes) {
      if (bytes <= size) return;
      block.reset(std::aligned_alloc(64, bytes));
      if (!block) throw std::bad_alloc();
      size = bytes;
    }
    char* data() const { return static_cast<char*>(block.get()); }
  };

  // The tile instructions are opaque to the compiler, which must not move memory accesses across them.
  static void barrier() { asm volatile("" ::: "memory"); }

  char* left(int i, int deep) const { return left_.data() + std::ptrdiff_t(i) * deep * kTileBytes; }
  char* right(int j, int deep) const { return right_.data() + std::ptrdiff_t(j) * deep * kTileBytes; }

  static __mmask16 first(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << std::max(n, 0)) - 1); }
  static __m512i rounded(__m512 low, __m512 high) { return __m512i(_mm512_cvtne2ps_pbh(high, low)); }
  // Two rows of 16 numbers as 16 pairs.
  static __m512i pairs(__m512 even, __m512 odd) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rounded(even, odd));
  }

  void pack_rows(int rows, int depth, int deep, const float* a, std::ptrdiff_t lda) {
    for (int i = 0; i < rows; ++i, a += lda) {
      char* to = left(i / kRows, deep) + i % kRows * 64;
      int k = 0;
      for (; k + kDepth <= depth; k += kDepth, to += kTileBytes)
        _mm512_store_si512(to, rounded(_mm512_loadu_ps(a + k), _mm512_loadu_ps(a + k + 16)));
      if (k < depth)
        _mm512_store_si512(
            to, rounded(
                    _mm512_maskz_loadu_ps(first(depth - k), a + k),
                    _mm512_maskz_loadu_ps(first(depth - k - 16), a + k + 16)));
    }
  }

  // a is (depth, rows).
  void pack_transposed(int rows, int depth, int deep, const float* a, std::ptrdiff_t lda) {
    alignas(64) float turned[kRows * kRows];
    for (int i = 0; i < rows; i += kRows) {
      const auto some = first(rows - i);
      for (int k = 0; k < deep; ++k) {
        for (int p = 0; p < kRows; ++p) {
          const int at = k * kDepth + 2 * p;
          const float* row = a + at * lda + i;
          const __m512 even = at < depth ? _mm512_maskz_loadu_ps(some, row) : _mm512_setzero_ps();
          const __m512 odd = at + 1 < depth ? _mm512_maskz_loadu_ps(some, row + lda) : _mm512_setzero_ps();
          _mm512_store_si512(turned + p * kRows, pairs(even, odd));
        }
        auto* to = reinterpret_cast<float*>(left(i / kRows, deep) + k * kTileBytes);
        at::vec::transpose_mxn<float, kRows, kRows>(turned, kRows, to, kRows);
      }
    }
  }

  void pack_columns(int columns, int depth, int deep, const float* b, std::ptrdiff_t ldb) {
    for (int k = 0; k < deep * kDepth; k += 2, b += 2 * ldb)
      for (int j = 0; j < columns; j += kRows) {
        const __m512 even = k < depth ? _mm512_loadu_ps(b + j) : _mm512_setzero_ps();
        const __m512 odd = k + 1 < depth ? _mm512_loadu_ps(b + ldb + j) : _mm512_setzero_ps();
        _mm512_store_si512(right(j / kRows, deep) + k / kDepth * kTileBytes + k % kDepth * 32, pairs(even, odd));
      }
  }

  // Two tiles of rows by two of columns, into four sums.
  void square(const char* top, const char* bottom, const char* first, const char* second, int deep) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::ptrdiff_t at = 0; at < deep * kTileBytes; at += kTileBytes) {
      _tile_loadd(4, top + at, 64);
      _tile_loadd(6, first + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, second + at, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, bottom + at, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    store_sums();
  }

  // Four tiles of rows by one of columns.
  void column(const char* a, const char* b, const char* c, const char* d, const char* columns, int deep) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::ptrdiff_t at = 0; at < deep * kTileBytes; at += kTileBytes) {
      _tile_loadd(7, columns + at, 64);
      _tile_loadd(4, a + at, 64);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, b + at, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, c + at, 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, d + at, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
    store_sums();
  }

  void store_sums() {
    char* to = sums_.data();
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kTileBytes, 64);
    _tile_stored(2, to + 2 * kTileBytes, 64);
    _tile_stored(3, to + 3 * kTileBytes, 64);
    barrier();
  }

  template <class Finish>
  void finish_tile(int n, int i, int j, int rows, const Finish& finish) const {
    const float* sums = reinterpret_cast<const float*>(sums_.data() + n * kTileBytes);
    for (int r = 0; r < std::min(kRows, rows - i * kRows); ++r)
      finish(i * kRows + r, j * kRows, load(sums + r * kRows));
  }

  bool wanted_;
  Buffer left_, right_, sums_;
};

#endif

}  // namespace titans
