// The choice of instruction set, made once, and tables of kernels indexed by it.
#pragma once
#include "luthier.h"

namespace lt {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, neon = 3 };

// The instruction set in use: the best that build and machine have, or the one LUTHIER_ISA names. -1: it cannot be had.
int active_isa();

// The one for products in tiles. The same, except on processors whose 512-bit units are two halves of 256 bits, where
// the tiles of avx2 measured 3 to 5 % faster (docs/kernels.md); LUTHIER_ISA overrules it.
int tiles_isa();

template <class Table>
struct Tables {
  const Table* of[4];
};

template <class Table>
const Table& table(const Tables<Table>& tables, int isa = active_isa()) {
  return *tables.of[isa];
}

}  // namespace lt

// In f.cpp, in namespace lt itself (not in an unnamed one): LT_DECLARE_TABLES(FTable, f) makes `f_tables`, for table(f_tables).
#ifdef LT_WITH_AVX2
#define LT_X86_TABLES(Table, name) \
  namespace avx2 { extern const Table name##_table; } \
  namespace avx512 { extern const Table name##_table; }
#define LT_X86_ENTRIES(name) &avx2::name##_table, &avx512::name##_table
#else
#define LT_X86_TABLES(Table, name)
#define LT_X86_ENTRIES(name) nullptr, nullptr
#endif
#ifdef LT_WITH_NEON
#define LT_ARM_TABLES(Table, name) namespace neon { extern const Table name##_table; }
#define LT_ARM_ENTRIES(name) &neon::name##_table
#else
#define LT_ARM_TABLES(Table, name)
#define LT_ARM_ENTRIES(name) nullptr
#endif
#define LT_DECLARE_TABLES(Table, name)                    \
  namespace portable { extern const Table name##_table; } \
  LT_X86_TABLES(Table, name)                              \
  LT_ARM_TABLES(Table, name)                              \
  static const Tables<Table> name##_tables = {{&portable::name##_table, LT_X86_ENTRIES(name), LT_ARM_ENTRIES(name)}};

// In f_isa.cpp, at namespace lt::LT_NAMESPACE: LT_DEFINE_TABLE(FTable, f) = {...};
#define LT_DEFINE_TABLE(Table, name) \
  extern const Table name##_table;   \
  const Table name##_table
