// Where `shared` begins in shared memory: the other sources are told, as SHARED_BASE.

#include "common.cuh"

extern "C" __global__ void find_shared_base(u32* base) {
  *base = static_cast<u32>(__cvta_generic_to_shared(shared));
}
