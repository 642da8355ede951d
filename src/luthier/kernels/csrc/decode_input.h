// The scratch memory of a step, and tokens as its products read them.
#pragma once
#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "decode.h"
#include "few.h"

namespace lt {

// Hands out pieces of one buffer, each 64-byte aligned; without a buffer it only counts.
class Pieces {
 public:
  explicit Pieces(char* buffer) : buffer_(buffer) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = buffer_ == nullptr ? nullptr : reinterpret_cast<T*>(buffer_ + used_);
    used_ += up(count * std::int64_t(sizeof(T)), 64);
    return piece;
  }
  std::size_t used() const { return std::size_t(used_); }

 private:
  char* buffer_;
  std::int64_t used_ = 0;
};

// Tokens as the products read them: packed for few.h, and in fixed point.
struct Input {
  std::int64_t T, width, blocks;
  float *rows, *packed, *sums;
  FixedToken fixed;  // of token 0; the others follow
  std::uint8_t* finite;

  void place(Pieces& pieces, std::int64_t tokens, std::int64_t most) {
    const std::int64_t padded = up(most, kPanelGroup);
    rows = pieces.take<float>(tokens * padded);
    packed = pieces.take<float>(tokens * padded);
    sums = pieces.take<float>(tokens * padded / kPanelGroup);
    const std::int64_t paired = up(padded, 2 * kPanelGroup);
    fixed = {pieces.take<std::int16_t>(tokens * paired), pieces.take<float>(tokens * 2 * paired / kPanelGroup)};
    finite = pieces.take<std::uint8_t>(tokens);
  }
  void resize(std::int64_t tokens, std::int64_t features) {
    T = tokens;
    width = features;
    blocks = up(features, kPanelGroup) / kPanelGroup;
  }
  float* row(std::int64_t t) const { return rows + t * blocks * kPanelGroup; }
  FixedToken token(std::int64_t t) const {
    const std::int64_t paired = up(blocks, 2);
    return {fixed.q + t * paired * kPanelGroup, fixed.common + t * 2 * paired};
  }
};

// One token as few.h reads it, and the sum of each block divided by the lanes of a vector.
inline void pack_token(const float* row, std::int64_t t, std::int64_t T, std::int64_t blocks, float* packed, float* sums,
                       int lanes) {
  for (std::int64_t b = 0; b < blocks; ++b, row += kPanelGroup) {
    float parts[8] = {};
    for (int i = 0; i < kPanelGroup; ++i) parts[i % 8] += row[i];
    std::memcpy(packed + few_place(t, T, b, blocks), row, sizeof(float) * kPanelGroup);
    const float halves = (parts[0] + parts[4]) + (parts[1] + parts[5]);
    sums[t * blocks + b] = (halves + ((parts[2] + parts[6]) + (parts[3] + parts[7]))) / float(lanes);
  }
}

}  // namespace lt
