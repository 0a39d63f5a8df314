// The Python module wmkernels._native: the only file that knows of Python.
//
// An op's arguments arrive as one flat tuple of integers, eight bytes each, in the order of its structure in
// wmkernels.h. Reading some 140 of them with the C API takes well under a microsecond, which an argument each would
// not.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>

// Declared hidden, so that a kernel that nobody wrote is an error of the linker and not of a user's import.
#pragma GCC visibility push(hidden)
#include "common/arg_layout.h"
#include "python/dlpack.h"
#include "python/step_fast_path.h"
#ifdef WMK_WITH_CUDA
#include "cuda/common/device_check.h"
#endif
#pragma GCC visibility pop

#if defined(_OPENMP) && !defined(_WIN32)
#include <dlfcn.h>
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;
using wmk::covers;
using wmk::kWord;
using wmk::Member;
using wmk::Op;

namespace {

// ---- The structures, as Python asks for them ----

template <class Arguments>
py::list layout_of() {
  py::list list;
  for (const Member& member : Op<Arguments>::members) list.append(py::make_tuple(member.name, member.size / kWord));
  return list;
}

py::list layout(const std::string& op) {
  if (op == Op<wmk_selective_scan>::name) return layout_of<wmk_selective_scan>();
  if (op == Op<wmk_selective_step>::name) return layout_of<wmk_selective_step>();
  if (op == Op<wmk_linear_scan>::name) return layout_of<wmk_linear_scan>();
  if (op == Op<wmk_conv_lstm>::name) return layout_of<wmk_conv_lstm>();
  if (op == Op<wmk_conv_lstm_update>::name) return layout_of<wmk_conv_lstm_update>();
  if (op == Op<wmk_conv_lstm_map>::name) return layout_of<wmk_conv_lstm_map>();
  throw py::value_error("there is no op '" + op + "'");
}

// ---- From tensors to words ----

// An attribute's name as a Python string that lives as long as the process.
PyObject* interned(const char* name) {
  PyObject* string = PyUnicode_InternFromString(name);
  if (string == nullptr) throw py::error_already_set();
  return string;
}

py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call_method(py::handle object, PyObject* name) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

int64_t integer(py::handle object) {
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Address and strides of a tensor, once it has the dtype, the shape and the device that the kernel expects.
void read_tensor(const char* op, const char* name, py::handle tensor, py::handle shape, py::handle dtype,
                 py::handle device, int64_t* words) {
  static PyObject* const s_dtype = interned("dtype");
  static PyObject* const s_shape = interned("shape");
  static PyObject* const s_device = interned("device");
  static PyObject* const s_data_ptr = interned("data_ptr");
  static PyObject* const s_stride = interned("stride");
  static PyObject* const s_itemsize = interned("itemsize");
  const auto equal = [](const py::object& a, py::handle b) {
    const int answer = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (answer < 0) throw py::error_already_set();
    return answer == 1;
  };
  const bool fits = attribute(tensor, s_dtype).is(dtype) && equal(attribute(tensor, s_shape), shape) &&
                    equal(attribute(tensor, s_device), device);
  if (!fits) {
    throw py::value_error(py::str("{}: {} is {} of shape {} on {}, the kernel expects {} of shape {} on {}")
                              .format(op, name, attribute(tensor, s_dtype), py::tuple(attribute(tensor, s_shape)),
                                      attribute(tensor, s_device), dtype,
                                      py::tuple(py::reinterpret_borrow<py::object>(shape)), device));
  }
  words[0] = integer(call_method(tensor, s_data_ptr));
  if (words[0] % integer(attribute(dtype, s_itemsize)) != 0) {
    throw py::value_error(std::string(op) + ": the memory of " + name + " is not aligned to its elements");
  }
  const py::object strides = call_method(tensor, s_stride);
  const Py_ssize_t rank = PyTuple_GET_SIZE(strides.ptr());
  if (rank > 4) throw py::value_error(std::string(op) + ": " + name + " has more than four dimensions");
  for (Py_ssize_t i = 0; i < rank; ++i) words[1 + i] = integer(PyTuple_GET_ITEM(strides.ptr(), i));
}

// The structure of an op as a flat tuple of words. A member is an integer; or for a view (tensor, shape, dtype), where
// the tensor may be None; or missing, which is 0.
template <class Arguments>
py::tuple pack_members(const py::dict& members, py::handle device) {
  static_assert(covers(Op<Arguments>::members, sizeof(Arguments)), "the list of members and wmkernels.h differ");
  constexpr size_t count = sizeof(Op<Arguments>::members) / sizeof(Member);
  static PyObject* const* const names = [] {
    static PyObject* strings[count];
    for (size_t i = 0; i < count; ++i) strings[i] = interned(Op<Arguments>::members[i].name);
    return strings;
  }();
  int64_t words[sizeof(Arguments) / kWord] = {};
  for (size_t i = 0; i < count; ++i) {
    const Member& member = Op<Arguments>::members[i];
    PyObject* value = PyDict_GetItemWithError(members.ptr(), names[i]);
    if (value == nullptr) {
      if (PyErr_Occurred()) throw py::error_already_set();
      continue;
    }
    int64_t* target = words + member.offset / kWord;
    if (member.size == kWord) {
      *target = integer(value);
    } else if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 3) {
      throw py::type_error(std::string(member.name) + " must be a tuple of a tensor, a shape and a dtype");
    } else if (PyTuple_GET_ITEM(value, 0) != Py_None) {
      read_tensor(Op<Arguments>::name, member.name, PyTuple_GET_ITEM(value, 0), PyTuple_GET_ITEM(value, 1),
                  PyTuple_GET_ITEM(value, 2), device, target);
    }
  }
  py::tuple flat(sizeof(words) / kWord);
  for (size_t i = 0; i < sizeof(words) / kWord; ++i) PyTuple_SET_ITEM(flat.ptr(), i, PyLong_FromLongLong(words[i]));
  return flat;
}

py::tuple pack(const std::string& op, const py::dict& members, py::handle device) {
  if (op == Op<wmk_selective_scan>::name) return pack_members<wmk_selective_scan>(members, device);
  if (op == Op<wmk_selective_step>::name) return pack_members<wmk_selective_step>(members, device);
  if (op == Op<wmk_linear_scan>::name) return pack_members<wmk_linear_scan>(members, device);
  if (op == Op<wmk_conv_lstm>::name) return pack_members<wmk_conv_lstm>(members, device);
  if (op == Op<wmk_conv_lstm_update>::name) return pack_members<wmk_conv_lstm_update>(members, device);
  if (op == Op<wmk_conv_lstm_map>::name) return pack_members<wmk_conv_lstm_map>(members, device);
  throw py::value_error("there is no op '" + op + "'");
}

// ---- From words to a call, and from a status to an exception ----

// Every member is eight bytes wide and trivially copyable, so the structure is an array of words to write into.
template <class Arguments>
Arguments read_words(py::handle words) {
  static_assert(covers(Op<Arguments>::members, sizeof(Arguments)), "the list of members and wmkernels.h differ");
  static_assert(sizeof(void*) == kWord, "a pointer is one word");
  constexpr Py_ssize_t count = sizeof(Arguments) / kWord;
  PyObject* sequence = words.ptr();
  const bool tuple = PyTuple_Check(sequence);
  if (!tuple && !PyList_Check(sequence)) throw py::type_error("words must be a tuple or a list of integers");
  const Py_ssize_t given = tuple ? PyTuple_GET_SIZE(sequence) : PyList_GET_SIZE(sequence);
  if (given != count) {
    throw py::value_error(std::string(Op<Arguments>::name) + ": " + std::to_string(given) + " words, expected " +
                          std::to_string(count));
  }
  int64_t values[count];
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* word = tuple ? PyTuple_GET_ITEM(sequence, i) : PyList_GET_ITEM(sequence, i);
    int overflow = 0;  // this variant reads addresses, which are two digits of a Python integer, three times as fast
    values[i] = PyLong_AsLongLongAndOverflow(word, &overflow);
    if (overflow != 0) throw py::value_error(std::string(Op<Arguments>::name) + ": a word does not fit 64 bits");
    if (values[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  Arguments arguments;
  std::memcpy(&arguments, values, sizeof(arguments));
  return arguments;
}

[[noreturn]] void raise(const std::string& op, int status) {
  switch (status) {
    case WMK_NULL_POINTER:
      throw py::value_error(op + ": a tensor that the kernel needs has no memory");
    case WMK_BAD_SEQUENCES:
      throw py::value_error(op + ": cu_seqlens must start at 0, never fall, and end at the number of time steps");
    case WMK_BAD_INDEX:
      throw py::value_error(op + ": state_batch_indices names a row that the state does not have");
    case WMK_UNSUPPORTED:
      throw py::value_error(op + ": the kernel was not built for this dtype or size");
    case WMK_NO_MEMORY:
      throw std::bad_alloc();  // MemoryError
    default:
      break;
  }
#ifdef WMK_WITH_CUDA
  if (status >= WMK_CUDA_ERROR) throw std::runtime_error(op + ": " + wmk_cuda_error_name(status - WMK_CUDA_ERROR));
#endif
  throw std::runtime_error(op + ": the kernel answered the unknown status " + std::to_string(status));
}

template <class Arguments>
void define(py::module_& module, const std::string& name, int (*kernel)(const Arguments*)) {
  module.def(name.c_str(), [kernel](py::handle words) {
    const Arguments arguments = read_words<Arguments>(words);
    int status;
    {
      py::gil_scoped_release others_may_run;
      status = kernel(&arguments);
    }
    if (status != WMK_OK) raise(Op<Arguments>::name, status);
  });
}

template <class Arguments>
void define(py::module_& module, const std::string& name, int64_t (*workspace)(const Arguments*)) {
  module.def(name.c_str(), [workspace](py::handle words) {
    const Arguments arguments = read_words<Arguments>(words);
    return workspace(&arguments);
  });
}

// ---- A step in one call ----

// PyTorch's own, or null where it has none (before 2.10).
const wmk::dlpack::Exchange* exchange() {
  static const wmk::dlpack::Exchange* const found = []() -> const wmk::dlpack::Exchange* {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return nullptr;
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* api = (const wmk::dlpack::Exchange*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (api == nullptr) PyErr_Clear();
    return api != nullptr && api->major == 1 && api->read != nullptr ? api : nullptr;
  }();
  return found;
}

// The members of a tuple, null where they are None; false where there are not so many.
template <size_t count>
bool members_of(const py::tuple& tensors, void* (&objects)[count]) {
  if (tensors.size() != count) return false;
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors.ptr(), i);
    objects[i] = object == Py_None ? nullptr : object;
  }
  return true;
}

// One step on the CPU from the tensors themselves (at_once.h). Answers false, having done nothing, where the tensors
// are not as it reads them: the caller then goes the long way, which knows what is wrong.
template <class Step, size_t count>
bool run_at_once(const py::tuple& tensors, const wmk::at_once::Options& options,
                 bool (*read)(const wmk::dlpack::Exchange&, void* const (&)[count], const wmk::at_once::Options&,
                              Step*),
                 int (*run)(Step*)) {
  void* objects[count];
  if (exchange() == nullptr || !members_of(tensors, objects)) return false;
  Step step = {};
  if (!read(*exchange(), objects, options, &step)) {
    PyErr_Clear();  // of what is no tensor
    return false;
  }
  int status;
  {
    py::gil_scoped_release others_may_run;
    status = run(&step);
  }
  if (status != WMK_OK) raise(Op<Step>::name, status);
  return true;
}

bool selective_step_at_once(const py::tuple& tensors, bool delta_softplus, int64_t threads) {
  return run_at_once<wmk_selective_step>(tensors, {threads, delta_softplus}, wmk::at_once::read_selective_step,
                                         [](wmk_selective_step* step) { return wmk_cpu_selective_step(step); });
}

bool conv_lstm_step_at_once(const py::tuple& tensors, int64_t threads) {
  return run_at_once<wmk_conv_lstm>(tensors, {threads, false}, wmk::at_once::read_conv_lstm_step,
                                    [](wmk_conv_lstm* step) {
                                      const int64_t size = wmk_cpu_conv_lstm_forward_workspace(step);
                                      const wmk::at_once::Scratch scratch(size);
                                      step->workspace = scratch.memory;
                                      return scratch.memory ? wmk_cpu_conv_lstm_forward(step) : WMK_NO_MEMORY;
                                    });
}

// ---- What the machine has ----

// The library whose OpenMP this extension runs on; empty if it was built without.
std::string openmp_library() {
#if defined(_OPENMP) && !defined(_WIN32)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 && info.dli_fname != nullptr) {
    return info.dli_fname;
  }
#endif
  return "";
}

// Asks for large pages behind memory that is about to be written for the first time: a page fault every 4 KiB takes
// longer than the kernel. A hint, which systems without large pages ignore.
void expect_large_pages(int64_t address, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const int64_t page = sysconf(_SC_PAGESIZE), begin = (address + page - 1) / page * page;
  const int64_t end = (address + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

void set_isa(const std::string& name) {
  if (wmk_cpu_set_isa(name.c_str()) != WMK_OK) {
    throw py::value_error("there is no instruction-set level '" + name + "' here, only " + wmk_cpu_isa_available());
  }
}

}  // namespace

#define WMK_DEFINE_SCAN(module, function)                                             \
  define(module, #function "_forward", wmk_##function##_forward);                     \
  define(module, #function "_forward_workspace", wmk_##function##_forward_workspace); \
  define(module, #function "_backward", wmk_##function##_backward);                   \
  define(module, #function "_backward_workspace", wmk_##function##_backward_workspace)

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "The compiled kernels of wmkernels. Import wmkernels instead: it loads torch first and checks tensors.";
  module.def("layout", layout, "Names of the members of an op's structure, each with its number of words.");
  module.def("pack", pack, "The structure of an op as words, from sizes and checked tensors.");
  module.def("expect_large_pages", expect_large_pages, "Asks for large pages behind memory not yet written.");
  WMK_DEFINE_SCAN(module, cpu_selective_scan);
  WMK_DEFINE_SCAN(module, cpu_linear_scan);
  WMK_DEFINE_SCAN(module, cpu_conv_lstm);
  define(module, "cpu_selective_step", wmk_cpu_selective_step);
  module.def("cpu_selective_step_at_once", selective_step_at_once,
             "One step from tensors, or false where it needs the long way.");
  module.def("cpu_conv_lstm_step_at_once", conv_lstm_step_at_once, "Likewise.");
  module.def("cpu_isa", [] { return wmk_cpu_isa(); }, "The instruction-set level in use.");
  module.def("cpu_isa_available", [] { return wmk_cpu_isa_available(); }, "Those that run here, best first.");
  module.def("cpu_set_isa", set_isa, "Use one of them.");
  module.def("cpu_multiply_adds", wmk_cpu_multiply_adds, py::call_guard<py::gil_scoped_release>(), py::arg("rounds"),
             "Performs fp32 multiply-adds on registers and answers how many: for measuring the machine.");
  module.def("openmp_library", openmp_library, "The library whose OpenMP runs the CPU kernels.");
#ifdef WMK_WITH_CUDA
  module.def("cuda_archs", [] { return wmk_cuda_architectures(); }, "Architectures with machine code in this build.");
  module.def("cuda_unavailable_reason", wmk_cuda_unavailable_reason, py::call_guard<py::gil_scoped_release>(),
             "Why this build's kernels cannot run on a GPU, empty if they can.");
#endif
#ifdef WMK_WITH_CUDA_SELECTIVE_SCAN
  WMK_DEFINE_SCAN(module, cuda_selective_scan);
#endif
#ifdef WMK_WITH_CUDA_LINEAR_SCAN
  WMK_DEFINE_SCAN(module, cuda_linear_scan);
#endif
#ifdef WMK_WITH_CUDA_SELECTIVE_STEP
  define(module, "cuda_selective_step", wmk_cuda_selective_step);
#endif
#ifdef WMK_WITH_CUDA_CONV_LSTM
  define(module, "cuda_conv_lstm_update_forward", wmk_cuda_conv_lstm_update_forward);
  define(module, "cuda_conv_lstm_update_backward", wmk_cuda_conv_lstm_update_backward);
  define(module, "cuda_conv_lstm_map", wmk_cuda_conv_lstm_map);
#endif
}
