// Repeats calls of the native operators that another processor recorded, and compares the results (arm.py).
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/sub.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>

namespace {

// A list as the operator's schema has it; a file has lists of anything.
c10::IValue typed(const c10::IValue& value, const c10::TypePtr& type) {
  const auto list = type->cast<c10::ListType>();
  if (!list) return value;
  c10::impl::GenericList found(list->getElementType());
  for (const c10::IValue& each : value.toListRef()) found.push_back(each);
  return found;
}

double difference(const at::Tensor& found, const at::Tensor& expected) {
  TORCH_CHECK(found.sizes() == expected.sizes(), "another shape");
  const auto x = found.to(at::kDouble), y = expected.to(at::kDouble);
  const double size = y.norm().item().toDouble(), distance = at::sub(x, y).norm().item().toDouble();
  return distance / std::max(size, 1e-12);
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  double worst[2] = {0, 0};
  int calls = 0, tensors = 0;
  const auto recorded = torch::jit::pickle_load(bytes);
  for (const c10::IValue& call : recorded.toListRef()) {
    const auto& parts = call.toTupleRef().elements();
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(parts[0].toStringRef().c_str(), "");
    torch::jit::Stack stack;
    const auto& given = parts[1].toTupleRef().elements();
    for (size_t i = 0; i < given.size(); ++i)
      stack.push_back(typed(given[i], op.schema().arguments()[i].type()));
    op.callBoxed(stack);
    const auto found = stack[0].toTensorVector();
    const auto expected = parts[2].toListRef();
    TORCH_CHECK(found.size() == expected.size(), "another number of tensors");
    for (size_t i = 0; i < found.size(); ++i, ++tensors) {
      if (!found[i].defined() || !found[i].is_floating_point()) continue;
      double& most = worst[found[i].scalar_type() == at::kDouble];
      most = std::max(most, difference(found[i], expected[i].toTensor()));
    }
    ++calls;
  }
  std::printf("%d calls, %d tensors: largest relative difference %.1e in float32, %.1e in float64\n", calls, tensors,
              worst[0], worst[1]);
  return !(worst[0] < 1e-4 && worst[1] < 1e-10);
}
