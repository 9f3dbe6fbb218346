// Arrays begin where a cache line does: a tile's row or a vector that lies across two is read at half the speed. Aligned
// here, not by operator new, which glibc serves with memory that it does not use again as readily.
#pragma once

#include <cstdint>
#include <memory>

template <typename T>
struct Array {
  std::unique_ptr<char[]> bytes;
  T* get() const { return (T*)((uintptr_t(bytes.get()) + 63) / 64 * 64); }
};

template <typename T>
Array<T> array(int64_t count) {
  return {std::unique_ptr<char[]>(new char[count * sizeof(T) + 63])};
}
