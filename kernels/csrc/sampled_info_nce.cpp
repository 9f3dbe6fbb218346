#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(cpc_kernels_cpu, m) {}
