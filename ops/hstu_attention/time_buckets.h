// Buckets of time differences without a logarithm, equal to ops/hstu_attention/buckets.py for every int64 difference.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace gr {

// Finds the bucket of a distance by table. Its leading bit and the three after it name a cell, narrower than any
// bucket, so that a cell holds at most one threshold above its first value.
class Buckets {
 public:
  static constexpr int64_t kPadding = 8;

  Buckets(const int64_t* thresholds, int64_t count) : count_(count) {
    int64_t base = 0;
    for (int64_t cell = 0; cell < kCells; ++cell) {
      const int64_t exponent = cell / 8;
      // Smallest integer of the cell. Past 2^24 a conversion to float rounds up by less than 2^-24 of it.
      uint64_t low = exponent < 3 ? (((8 + cell % 8) << exponent) + 7) / 8 : uint64_t(8 + cell % 8) << (exponent - 3);
      if (exponent >= 24) low -= low >> 24;
      while (base < count && uint64_t(thresholds[base]) <= low) ++base;
      const int64_t next = base < count ? thresholds[base] : INT64_MAX;
      base_[cell] = static_cast<int32_t>(base);
      next_[cell] = next;
      next32_[cell] = static_cast<int32_t>(std::min<int64_t>(next, INT32_MAX));
    }
  }

  // Any difference; wraps like int64 subtraction in PyTorch.
  int32_t operator()(int64_t a, int64_t b) const {
    int64_t d = static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
    if (d < 0) d = static_cast<int64_t>(-static_cast<uint64_t>(d));
    if (d <= 1) return 0;
    if (d == INT64_MAX) return static_cast<int32_t>(count_);
    const int exponent = 63 - __builtin_clzll(static_cast<uint64_t>(d));
    const int64_t mantissa = (exponent >= 3 ? d >> (exponent - 3) : d << (3 - exponent)) & 7;
    const int64_t cell = 8 * exponent + mantissa;
    return base_[cell] + (d >= next_[cell]);
  }

  // Buckets of |time - times[j]|, all differences below 2^31 - 1. Works in whole vectors: `times` and `buckets` have
  // kPadding more elements than count.
  void small(int32_t time, const int32_t* times, int64_t count, int32_t* buckets) const {
    int64_t j = 0;
#ifdef __AVX2__
    const __m256i times8 = _mm256_set1_epi32(time), one = _mm256_set1_epi32(1), shift = _mm256_set1_epi32(127 << 3);
    for (; j < count; j += 8) {
      const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(times + j));
      const __m256i d = _mm256_max_epi32(_mm256_abs_epi32(_mm256_sub_epi32(times8, other)), one);
      const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(d));
      const __m256i cell = _mm256_sub_epi32(_mm256_srli_epi32(bits, 20), shift);
      const __m256i base = _mm256_i32gather_epi32(base_, cell, 4), next = _mm256_i32gather_epi32(next32_, cell, 4);
      // A comparison is -1 where true: base + 1 - (next > d).
      const __m256i bucket = _mm256_add_epi32(_mm256_add_epi32(base, one), _mm256_cmpgt_epi32(next, d));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(buckets + j), bucket);
    }
#endif
    for (; j < count; ++j) {
      const int32_t d = std::max(std::abs(time - times[j]), 1);
      const float rounded = static_cast<float>(d);
      int32_t bits;
      std::memcpy(&bits, &rounded, sizeof(bits));
      const int32_t cell = (bits >> 20) - (127 << 3);
      buckets[j] = base_[cell] + (d >= next32_[cell]);
    }
  }

 private:
  static constexpr int64_t kCells = 63 * 8;
  int64_t count_;
  int32_t base_[kCells], next32_[kCells];
  int64_t next_[kCells];
};

}  // namespace gr
