#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace lt {
namespace {

bool machine_has(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#ifdef LT_WITH_AVX2
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return machine_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef LT_WITH_NEON
    case Isa::neon:
      return true;
#endif
    default:
      return false;
  }
}

int choose() {
  static const char* const names[4] = {"portable", "avx2", "avx512", "neon"};
  const char* forced = std::getenv("LUTHIER_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (int isa = 0; isa < 4; ++isa) {
      if (std::strcmp(forced, names[isa]) == 0) return machine_has(Isa(isa)) ? isa : -1;
    }
    return -1;
  }
  for (int isa = 3; isa > 0; --isa) {
    if (machine_has(Isa(isa))) return isa;
  }
  return 0;
}

// AMD's family 19h has AVX-512 only as Zen 4, with 256-bit units.
bool halves_512_bits() {
#ifdef LT_WITH_AVX2
  return __builtin_cpu_is("amdfam19h");
#else
  return false;
#endif
}

int choose_for_tiles() {
  const char* forced = std::getenv("LUTHIER_ISA");
  const bool free = forced == nullptr || *forced == '\0';
  return free && active_isa() == int(Isa::avx512) && halves_512_bits() ? int(Isa::avx2) : active_isa();
}

}  // namespace

int active_isa() {
  static const int chosen = choose();
  return chosen;
}

int tiles_isa() {
  static const int chosen = choose_for_tiles();
  return chosen;
}

}  // namespace lt

LT_API int lt_abi_version() { return kAbiVersion; }
LT_API int lt_isa() { return lt::active_isa(); }
