// A vector register of floats or doubles.
#pragma once

#include <cstddef>

namespace titans {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 16;  // of 32 registers: enough to hide the latency of a multiply-add
#else
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 8;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T anywhere __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

// A caller's tensor may begin anywhere.
template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::anywhere*>(p);
}
template <class T>
inline void store(T* p, Vector<T> x) {
  *reinterpret_cast<typename VectorOf<T>::anywhere*>(p) = x;
}
template <class T>
inline Vector<T> splat(T x) {
  return Vector<T>{} + x;
}

inline int padded(int n, int lanes) { return (n + lanes - 1) / lanes * lanes; }

}  // namespace titans
