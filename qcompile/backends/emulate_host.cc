// Runs the program of an artifact without Python: how ARM artifacts run under qemu on another machine.
//
// usage: host LIBRARY ARGUMENTS RESULTS
// ARGUMENTS holds the number of tensors and then each: code and bits of its type (DLPack), number of extents, extents (all
// uint64), bytes. RESULTS receives the outputs in the same form.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace tvm::ffi;

namespace {

struct Aligned {
  void AllocData(DLTensor* t) {
    size_t bytes = (t->dtype.bits + 7) / 8;
    for (int i = 0; i < t->ndim; ++i) bytes *= t->shape[i];
    t->data = aligned_alloc(64, (bytes / 64 + 1) * 64);
  }
  void FreeData(DLTensor* t) { free(t->data); }
};

size_t Bytes(const Tensor& t) {
  size_t bytes = (t.dtype().bits + 7) / 8;
  for (int64_t extent : t.shape()) bytes *= extent;
  return bytes;
}

uint64_t Word(FILE* in) {
  uint64_t value = 0;
  if (fread(&value, sizeof value, 1, in) != 1) exit(3);
  return value;
}

Tensor Read(FILE* in) {
  DLDataType dtype{static_cast<uint8_t>(Word(in)), 0, 1};
  dtype.bits = static_cast<uint8_t>(Word(in));
  std::vector<int64_t> shape(Word(in));
  for (int64_t& extent : shape) extent = static_cast<int64_t>(Word(in));
  Tensor made = Tensor::FromNDAlloc(Aligned(), Shape(shape.begin(), shape.end()), dtype, DLDevice{kDLCPU, 0});
  if (fread(made.data_ptr(), 1, Bytes(made), in) != Bytes(made)) exit(3);
  return made;
}

void Write(FILE* out, const Tensor& t) {
  std::vector<uint64_t> head{t.dtype().code, t.dtype().bits, static_cast<uint64_t>(t.ndim())};
  for (int64_t extent : t.shape()) head.push_back(static_cast<uint64_t>(extent));
  fwrite(head.data(), sizeof(uint64_t), head.size(), out);
  fwrite(t.data_ptr(), 1, Bytes(t), out);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  FILE* in = fopen(argv[2], "rb");
  FILE* out = fopen(argv[3], "wb");
  if (!in || !out) return 2;
  try {
    Module library = Module::LoadFromFile(argv[1]);
    Module vm = library->GetFunction("vm_load_executable").value()().cast<Module>();
    vm->GetFunction("vm_initialization").value()(1, 0, 2);  // CPU, device 0, pooled allocator
    uint64_t count = Word(in);
    std::vector<Any> arguments;
    for (; count; --count) arguments.push_back(Read(in));
    std::vector<AnyView> views(arguments.begin(), arguments.end());
    Any result;
    vm->GetFunction("main").value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
    std::vector<Tensor> tensors;
    if (auto one = result.try_cast<Tensor>()) {
      tensors.push_back(*one);
    } else {
      for (const Tensor& t : result.cast<Array<Tensor>>()) tensors.push_back(t);
    }
    uint64_t outputs = tensors.size();
    fwrite(&outputs, sizeof outputs, 1, out);
    for (const Tensor& t : tensors) Write(out, t);
  } catch (const Error& error) {
    fprintf(stderr, "%s: %s\n", error.kind().c_str(), error.message().c_str());
    return 1;
  }
  return fclose(out) != 0;
}
