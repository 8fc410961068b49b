// Explicit short vectors through the compiler's vector extension: AVX2, AVX-512 and NEON from one source.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace gr {

// 32-byte vectors. Rows are laid out in whole 64-byte cache lines, so threads working on different lines never meet.
template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(32)));
  static constexpr int kLanes = 4;
};

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

template <class T>
inline int64_t padded(int64_t width) {
  return (width + kLine<T> - 1) / kLine<T> * kLine<T>;
}

template <class T>
inline int64_t vectors(int64_t width) {
  return (width + Simd<T>::kLanes - 1) / Simd<T>::kLanes;
}

template <class T>
inline typename Simd<T>::Vec load(const T* from) {
  typename Simd<T>::Vec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
inline void store(T* to, typename Simd<T>::Vec value) {
  std::memcpy(to, &value, sizeof(value));
}

inline float sum(Simd<float>::Vec v) {
  typedef float Half __attribute__((vector_size(16)));
  const Half low = {v[0], v[1], v[2], v[3]};
  const Half high = {v[4], v[5], v[6], v[7]};
  const Half half = low + high;
  return (half[0] + half[2]) + (half[1] + half[3]);
}

inline double sum(Simd<double>::Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// The largest of count >= 1 values; a NaN among them may or may not be the result.
template <class T>
inline T maximum(const T* values, int64_t count) {
  constexpr int kLanes = Simd<T>::kLanes;
  T largest = values[0];
  int64_t i = 0;
  if (count >= 2 * kLanes) {
    typename Simd<T>::Vec even = load(values), odd = load(values + kLanes);
    for (i = 2 * kLanes; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const typename Simd<T>::Vec a = load(values + i), b = load(values + i + kLanes);
      even = a > even ? a : even;
      odd = b > odd ? b : odd;
    }
    even = odd > even ? odd : even;
    for (int lane = 0; lane < kLanes; ++lane) largest = even[lane] > largest ? even[lane] : largest;
  }
  for (; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

// Cache-line aligned scratch memory, uninitialized.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
inline Buffer<T> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / 64 + 1) * 64;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

// exp to about one unit in the last place, in a form compilers vectorize. Arguments below -87 give exp(-87), above 88
// exp(88); NaN stays NaN. The two fma keep the range reduction exact under -fassociative-math.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float scaled = x * 1.44269504f;
  const int32_t power = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
  const float whole = static_cast<float>(power);
  float r = __builtin_fmaf(-whole, 0.693359375f, x);
  r = __builtin_fmaf(-whole, -2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.0f;
  const uint32_t bits = (static_cast<uint32_t>(power) + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

inline double fast_exp(double x) { return __builtin_exp(x); }

}  // namespace gr
