// All Python-specific code is here. `prepare` checks a call's tensors and fills its structure (wmkernels.h) once.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

// A missing kernel fails at link time, not at import.
#pragma GCC visibility push(hidden)
#include "common/prepared_call.h"
#include "common/status.h"
#include "common/step_fast_path.h"
#include "cpu/dispatch/isa.h"
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
using wmk::kWord;
using wmk::Member;
using wmk::PreparedCall;

namespace {

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

bool is_freed(py::handle tensor, int64_t address, int64_t item_size) {
  static PyObject* const s_numel = interned("numel");
  static PyObject* const s_storage_offset = interned("storage_offset");
  return integer(call_method(tensor, s_numel)) > 0 &&
         address == integer(call_method(tensor, s_storage_offset)) * item_size;
}

// Checks dtype, shape, device and alignment; writes address and strides to `words`.
void read_tensor(const char* op, const char* name, py::handle tensor, py::handle shape, py::handle dtype,
                 py::handle device, int64_t* words) {
  static PyObject* const s_dtype = interned("dtype");
  static PyObject* const s_shape = interned("shape");
  static PyObject* const s_device = interned("device");
  static PyObject* const s_data_ptr = interned("data_ptr");
  static PyObject* const s_stride = interned("stride");
  static PyObject* const s_itemsize = interned("itemsize");
  const auto equal = [](const py::object& a, py::handle b) {
    const int same = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (same < 0) throw py::error_already_set();
    return same == 1;
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
  // Freed storage has the address 0, a view of it its offset: neither is an absent tensor. Memory lies above this
  // bound.
  constexpr int64_t lowest = int64_t(1) << 40;
  if (words[0] < lowest && is_freed(tensor, words[0], integer(attribute(dtype, s_itemsize)))) {
    throw py::value_error(std::string(op) + ": the memory of " + name + " was freed: its storage has no bytes");
  }
  if (words[0] % integer(attribute(dtype, s_itemsize)) != 0) {
    throw py::value_error(std::string(op) + ": the memory of " + name + " is not aligned to its elements");
  }
  const py::object strides = call_method(tensor, s_stride);
  const Py_ssize_t rank = PyTuple_GET_SIZE(strides.ptr());
  if (rank > 4) throw py::value_error(std::string(op) + ": " + name + " has more than four dimensions");
  for (Py_ssize_t i = 0; i < rank; ++i) words[1 + i] = integer(PyTuple_GET_ITEM(strides.ptr(), i));
}

struct NamedKernel {
  const wmk::Kernel* kernel;
  std::vector<PyObject*> members;
};

const NamedKernel& find_kernel(std::string_view name) {
  static const auto* const kernels = [] {
    auto* map = new std::unordered_map<std::string_view, NamedKernel>;
    for (const wmk::Kernel& kernel : wmk::kKernels) {
      NamedKernel& named = (*map)[kernel.name];
      named.kernel = &kernel;
      for (size_t i = 0; i < kernel.layout->count; ++i) {
        named.members.push_back(interned(kernel.layout->members[i].name));
      }
    }
    return map;
  }();
  const auto found = kernels->find(name);
  if (found == kernels->end()) throw py::value_error("there is no kernel '" + std::string(name) + "'");
  return found->second;
}

[[noreturn]] void refuse_unknown_member(const NamedKernel& named, const py::dict& members) {
  std::string unknown;
  for (const auto& item : members) {
    const std::string name = py::str(item.first);
    const auto has_name = [&](PyObject* member) { return name == std::string(py::str(py::handle(member))); };
    if (std::none_of(named.members.begin(), named.members.end(), has_name)) unknown = name;
  }
  throw py::type_error(std::string(named.kernel->layout->name) + ": there is no member '" + unknown + "'");
}

// A member is an integer, or (tensor or None, shape, dtype) for a view; a missing one is 0.
std::unique_ptr<PreparedCall> prepare(std::string_view name, const py::dict& members, py::handle device) {
  const NamedKernel& named = find_kernel(name);
  const wmk::Layout& layout = *named.kernel->layout;
  auto call = std::make_unique<PreparedCall>(*named.kernel);
  Py_ssize_t found = 0;
  for (size_t i = 0; i < layout.count; ++i) {
    const Member& member = layout.members[i];
    PyObject* value = PyDict_GetItemWithError(members.ptr(), named.members[i]);
    if (value == nullptr) {
      if (PyErr_Occurred()) throw py::error_already_set();
      continue;
    }
    ++found;
    int64_t* target = call->words() + member.offset / kWord;
    if (member.size == kWord) {
      *target = integer(value);
    } else if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 3) {
      throw py::type_error(std::string(layout.name) + ": " + member.name +
                           " must be a tuple of a tensor, a shape and a dtype");
    } else if (PyTuple_GET_ITEM(value, 0) != Py_None) {
      read_tensor(layout.name, member.name, PyTuple_GET_ITEM(value, 0), PyTuple_GET_ITEM(value, 1),
                  PyTuple_GET_ITEM(value, 2), device, target);
    }
  }
  if (found != PyDict_GET_SIZE(members.ptr())) refuse_unknown_member(named, members);
  return call;
}

[[noreturn]] void raise(const std::string& op, int status) {
  const wmk::Explanation explanation = wmk::explain(op, status);
  if (explanation.kind == wmk::Failure::memory) throw std::bad_alloc();  // MemoryError
  if (explanation.kind == wmk::Failure::value) throw py::value_error(explanation.text);
  throw std::runtime_error(explanation.text);
}

void run(const PreparedCall& call, int64_t workspace) {
  if (!call.kernel().run) throw std::runtime_error(std::string(call.kernel().name) + ": this build does not have it");
  int status;
  {
    py::gil_scoped_release others_may_run;
    status = call.run(workspace);
  }
  if (status != WMK_OK) raise(call.layout().name, status);
}

py::tuple words_of(const PreparedCall& call) {
  py::tuple flat(call.count());
  for (size_t i = 0; i < call.count(); ++i) flat[i] = call.words()[i];
  return flat;
}

// Names, each with its number of 8-byte words.
py::list layout_of(const PreparedCall& call) {
  py::list list;
  const wmk::Layout& layout = call.layout();
  for (size_t i = 0; i < layout.count; ++i) {
    list.append(py::make_tuple(layout.members[i].name, layout.members[i].size / kWord));
  }
  return list;
}

// Null before PyTorch 2.10.
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

int without_gil(int (*run)(const void*), const void* arguments) {
  py::gil_scoped_release others_may_run;
  return run(arguments);
}

// False, without effect, where the ordinary path must run.
bool run_fast_path(const wmk::NamedStepFastPath& path, const py::tuple& tensors, const wmk::StepOptions& options) {
  if (exchange() == nullptr) return false;
  constexpr size_t most = 16;
  void* objects[most];
  const size_t count = tensors.size();
  if (count > most) return false;
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors.ptr(), i);
    objects[i] = object == Py_None ? nullptr : object;
  }
  const int status = path.run(*exchange(), objects, count, options, without_gil);
  if (status == wmk::kNotApplicable) {
    PyErr_Clear();  // not a tensor
    return false;
  }
  if (status != WMK_OK) raise(path.op, status);
  return true;
}

// `layers`: structures of cpu/layers/layers.h, one after another.
void run_layers(const py::bytes& layers, const py::tuple& ends, int64_t rows, int64_t width, int64_t steps,
                int64_t given, int64_t threads) {
  const std::string_view bytes = layers;
  std::vector<wmk::Layer> copy(bytes.size() / sizeof(wmk::Layer));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(copy.data()));
  wmk::LayerChain chain = {copy.data(), int64_t(copy.size()), {}, rows, width, steps, given, threads};
  bool valid = bytes.size() % sizeof(wmk::Layer) == 0 && ends.size() == std::size(chain.ends);
  for (size_t i = 0; valid && i < ends.size(); ++i) chain.ends[i] = ends[i].cast<int64_t>();
  if (!valid || !wmk::is_valid(chain)) throw py::value_error("run_layers: the layers do not fit their scratch");
  int status;
  {
    py::gil_scoped_release others_may_run;
    status = wmk::level().run_layers(chain);
  }
  if (status != WMK_OK) raise("run_layers", status);
}

// Path of this extension's OpenMP library; empty without.
std::string openmp_library() {
#if defined(_OPENMP) && !defined(_WIN32)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 && info.dli_fname != nullptr) {
    return info.dli_fname;
  }
#endif
  return "";
}

// Before the first write: a page fault per 4 KiB takes longer than the kernel.
void advise_huge_pages(int64_t address, int64_t bytes) {
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

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "The compiled kernels of wmkernels. Import wmkernels instead: it loads torch first and checks tensors.";
  py::class_<PreparedCall>(module, "PreparedCall", "A checked call of a kernel.")
      .def_property_readonly("workspace_bytes", &PreparedCall::workspace_bytes)
      .def("run", run, py::arg("workspace") = 0, "Runs the kernel with a workspace at this address.")
      .def_property_readonly("words", words_of, "The structure as integers.")
      .def_property_readonly("layout", layout_of, "Names of its members, each with its number of words.");
  module.def("prepare", prepare, "A call of a kernel, from sizes and checked tensors.");
  py::set kernels;
  for (const wmk::Kernel& kernel : wmk::kKernels) {
    if (kernel.run != nullptr) kernels.add(kernel.name);
  }
  module.attr("kernels") = py::frozenset(kernels);
  module.def("advise_huge_pages", advise_huge_pages, "Advises huge pages for memory not yet written.");
  for (const wmk::NamedStepFastPath& path : wmk::kStepFastPaths) {
    const auto run = [&path](const py::tuple& tensors, int64_t threads, int64_t flags) {
      return run_fast_path(path, tensors, {threads, flags});
    };
    module.def(path.name, run, py::arg("tensors"), py::arg("threads"), py::arg("flags") = 0,
               "One step from tensors; false where it needs the ordinary path.");
  }
  module.def("cpu_run_layers", run_layers, py::arg("layers"), py::arg("ends"), py::arg("rows"), py::arg("width"),
             py::arg("steps"), py::arg("given"), py::arg("threads"), "Runs a chain of layers: wmkernels/layers.py.");
  module.def("cpu_isa", [] { return wmk_cpu_isa(); }, "The instruction-set level in use.");
  module.def("cpu_isa_available", [] { return wmk_cpu_isa_available(); }, "Those that run here, best first.");
  module.def("cpu_set_isa", set_isa, "Use one of them.");
  module.def("cpu_multiply_adds", wmk_cpu_multiply_adds, py::call_guard<py::gil_scoped_release>(),
             py::arg("iterations"),
             "Performs fp32 multiply-adds on registers and returns their number: for measuring the machine.");
  module.def("openmp_library", openmp_library, "The library whose OpenMP runs the CPU kernels.");
#ifdef WMK_WITH_CUDA
  module.def("cuda_archs", [] { return wmk_cuda_architectures(); }, "Architectures with machine code in this build.");
  module.def("cuda_unavailable_reason", wmk_cuda_unavailable_reason, py::call_guard<py::gil_scoped_release>(),
             "Why this build's kernels cannot run on a GPU, empty if they can.");
#endif
}
