// Counter-based random bits, the C++ twin of ops/random/reference.py: a value depends on (seed, key, lane) alone, so
// any element can be drawn anywhere, in any order, by any number of threads, with the same result.
#pragma once

#include <cstdint>

namespace gr {

constexpr uint32_t kLaneStep = 0x9e3779b9u;

// The 32-bit finalizer "lowbias32": a bijection whose every output bit depends on every input bit.
inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

inline uint32_t token_hash(uint64_t seed, uint64_t key) {
  const uint32_t low = mix(static_cast<uint32_t>(key) ^ static_cast<uint32_t>(seed));
  return mix(low ^ static_cast<uint32_t>(key >> 32) ^ (static_cast<uint32_t>(seed >> 32) * kLaneStep));
}

inline uint32_t lane_bits(uint32_t token, uint32_t lane) { return mix(token + lane * kLaneStep); }

// Same threshold as ops.random.drop_threshold: an element is dropped iff its bits are below it.
inline bool dropped(uint32_t token, uint32_t lane, uint32_t threshold) { return lane_bits(token, lane) < threshold; }

}  // namespace gr
