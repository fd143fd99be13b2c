// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), as
// mpformer/ops/random_bits.py defines the streams: number i of a call is word i % 4 at the counter
// (i / 4, call, row, place). Read by the C++ compiler and by NVRTC.
#pragma once

#ifdef __CUDACC__
#define MPFORMER_HOST_AND_DEVICE __host__ __device__
#else
#define MPFORMER_HOST_AND_DEVICE
#endif

namespace mpformer {

typedef unsigned int Word;  // 32 bits

struct Stream {
  Word key0, key1, row, place;
};

struct FourWords {
  Word word[4];
};

MPFORMER_HOST_AND_DEVICE static inline void philox_round(Word& a, Word& b, Word& c, Word& d, Word key0, Word key1) {
  const unsigned long long low = 0xD2511F53ull * a, high = 0xCD9E8D57ull * c;
  a = Word(high >> 32) ^ b ^ key0;
  b = Word(high);
  c = Word(low >> 32) ^ d ^ key1;
  d = Word(low);
}

constexpr int kPhiloxRounds = 10;
constexpr Word kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;  // of the key, from round to round

MPFORMER_HOST_AND_DEVICE static inline FourWords philox(const Stream& stream, Word call, Word block) {
  Word a = block, b = call, c = stream.row, d = stream.place;
  for (Word round = 0; round < kPhiloxRounds; round++)
    philox_round(a, b, c, d, stream.key0 + round * kPhiloxStep0, stream.key1 + round * kPhiloxStep1);
  return {{a, b, c, d}};
}

}  // namespace mpformer
