// The operators on a CPU: a kernel where it can serve, else the reference in PyTorch, which the Python package registers.
#include "../packed/packed.h"
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

std::atomic<const packed::Kernels*> chosen{packed::runnable().front()};  // null: the reference

std::optional<packed::Type> type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return packed::Type::bfloat16;
    case ScalarType::Half: return packed::Type::float16;
    case ScalarType::Float: return packed::Type::float32;
    case ScalarType::Char: return packed::Type::int8;
    case ScalarType::Byte: return packed::Type::int4;
    default: return std::nullopt;
  }
}

bool floating(std::optional<packed::Type> type) {
  return type && *type != packed::Type::int8 && *type != packed::Type::int4;
}

// Nothing where a kernel cannot serve: rows that do not begin at a byte, types it does not know, tensors with gaps, an
// input of another width than the mask's.
std::optional<packed::Matrix> matrix_of(const Tensor& mask, const Tensor& values, const Tensor& starts,
                                        const std::optional<Tensor>& scales, int64_t group, int64_t columns) {
  const auto type = type_of(values.scalar_type());
  if (!type || columns <= 0 || columns % 8 || !mask.is_contiguous() || !values.is_contiguous() ||
      !starts.is_contiguous() || starts.scalar_type() != ScalarType::Long ||
      mask.numel() != (starts.numel() - 1) * columns / 8 || (scales && (!scales->is_contiguous() || scales->scalar_type() != ScalarType::Float)) ||
      scales.has_value() == floating(type) || group < 0 || (scales && group % 8))
    return std::nullopt;
  packed::Matrix m;
  m.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  m.values = values.const_data_ptr();
  m.type = *type;
  m.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  m.scales = scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  m.rows = starts.numel() - 1;
  m.columns = columns;
  m.group = scales && group ? group : columns;
  m.groups = (columns + m.group - 1) / m.group;
  return m;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {  // not through the dispatcher, which takes longer
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class... Arguments> Tensor called(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows over threads, `threads` parts of which each has as many values as the others.
template <class F> void over_rows(const packed::Matrix& m, int64_t first, int64_t last, const F& f) {
  const int64_t small = 65536;  // weights: less than waking a thread is worth
  const int64_t threads = (last - first) * m.columns < small ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return f(first, last);
  const int64_t begin = m.starts[first], kept = m.starts[last] - begin;
  const auto cut = [&](int64_t i) -> int64_t {
    if (i == 0) return first;
    if (i == threads) return last;
    return std::lower_bound(m.starts + first, m.starts + last, begin + kept * i / threads) - m.starts;
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t t, int64_t end) {
    for (; t < end; t++) f(cut(t), cut(t + 1));
  });
}

void unpack(const packed::Kernels& kernels, const packed::Matrix& m, packed::Type type, const Tensor& into,
            int64_t first, int64_t last) {
  auto* data = static_cast<uint8_t*>(into.mutable_data_ptr());
  const int64_t row = m.columns * (type == packed::Type::float32 ? 4 : 2);
  over_rows(m, first, last, [&](int64_t begin, int64_t end) {
    kernels.unpack(m, data + (begin - first) * row, type, begin, end);
  });
}

// The product by dense tiles, one after the other in the same memory: so large that threads are worth their waking, so
// small that a tile is still in the cache when it is multiplied with.
void in_tiles(const packed::Kernels& kernels, const packed::Matrix& m, packed::Type type, const Tensor& input,
              Tensor& output) {
  const int64_t rows = std::min(std::max<int64_t>((int64_t(1) << 21) / m.columns, 64), m.rows);
  Tensor tile = empty({rows, m.columns}, input.scalar_type());
  for (int64_t first = 0; first < m.rows; first += rows) {
    const int64_t count = std::min(rows, m.rows - first);
    unpack(kernels, m, type, tile, first, first + count);
    Tensor some = torch::stable::narrow(tile, 0, 0, count), part = torch::stable::narrow(output, -1, first, count);
    torch::stable::copy_(part, called("aten::linear", input, some, std::optional<Tensor>()));
  }
}

}  // namespace

Tensor linear(Tensor input, Tensor mask, Tensor values, Tensor starts, std::optional<Tensor> scales, int64_t group) {
  const packed::Kernels* kernels = chosen.load(std::memory_order_relaxed);
  const auto type = type_of(input.scalar_type());
  const auto sizes = input.sizes();
  const int64_t columns = sizes.size() ? sizes[sizes.size() - 1] : 0;
  const auto m = kernels && floating(type) && input.is_contiguous()
                     ? matrix_of(mask, values, starts, scales, group, columns) : std::nullopt;
  const int64_t batch = m ? input.numel() / columns : 0;
  if (!m) return called("optimum_dsa::linear_reference", input, mask, values, starts, scales, group);
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = m->rows;
  Tensor output = empty(shape, input.scalar_type());
  if (batch == 0 || m->rows == 0) return output;
  if (batch > kernels->most(*m)) {
    in_tiles(*kernels, *m, *type, input, output);
    return output;
  }
  const packed::Layout layout = kernels->layout(*m, *type);
  const packed::Inputs inputs =
      packed::prepare(input.const_data_ptr(), *type, batch, columns, layout, packed::block_of(*m));
  const packed::Output out{output.mutable_data_ptr(), *type, batch, m->rows};
  over_rows(*m, 0, m->rows, [&](int64_t first, int64_t last) { kernels->product(*m, inputs, out, first, last); });
  return output;
}

Tensor dense_rows(Tensor mask, Tensor values, Tensor starts, std::optional<Tensor> scales, int64_t group,
                  int64_t columns, int64_t first, int64_t last, ScalarType dtype) {
  const packed::Kernels* kernels = chosen.load(std::memory_order_relaxed);
  const auto type = type_of(dtype);
  const auto m = kernels && floating(type) ? matrix_of(mask, values, starts, scales, group, columns) : std::nullopt;
  if (!m || first < 0 || last > m->rows || first > last)
    return called("optimum_dsa::dense_rows_reference", mask, values, starts, scales, group, columns, first, last,
                     dtype);
  Tensor output = empty({last - first, columns}, dtype);
  if (first == last) return output;
  unpack(*kernels, *m, *type, output, first, last);
  return output;
}

int optimum_dsa_kernels_use(const char* name) {
  if (std::string(name) == "reference") {
    chosen = nullptr;
    return 1;
  }
  for (const packed::Kernels* one : packed::runnable())
    if (std::string(name) == one->name) {
      chosen = one;
      return 1;
    }
  return 0;
}

const char* optimum_dsa_kernels_runnable() {
  static const std::string names = [] {
    std::string all;
    for (const packed::Kernels* one : packed::runnable()) all += (all.empty() ? "" : " ") + std::string(one->name);
    return all;
  }();
  return names.c_str();
}

int optimum_dsa_kernels_contract() { return 1; }
