// Arrays begin where a cache line does: a tile's row or a vector that lies across two is read at half the speed.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

struct Free {
  void operator()(void* x) const { ::operator delete[](x, std::align_val_t(64)); }
};

template <typename T>
std::unique_ptr<T[], Free> array(int64_t count) {
  return std::unique_ptr<T[], Free>(new (std::align_val_t(64)) T[count]);
}
