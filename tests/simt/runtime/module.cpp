// SPDX-License-Identifier: Apache-2.0
#include "module.h"

#include <cxxabi.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <list>

extern "C" void* __tls_get_addr(size_t*);  // the ABI's own: {module, offset}

namespace simt {

namespace {

std::string demangled(const char* symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : symbol;
  std::free(text);
  return name;
}

void erase_all(std::string& text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
}

// "void a::(anonymous namespace)::kernel<float, int>(a::Args<float>)" -> "kernel<float, int>"
std::string function_name(const char* symbol) {
  std::string name = demangled(symbol);
  erase_all(name, "(anonymous namespace)::");
  erase_all(name, "llmkern::cuda::");
  int depth = 0;
  size_t at = name.size();
  while (at > 0 && name.back() == ')') {
    --at;
    depth += name[at] == ')' ? 1 : name[at] == '(' ? -1 : 0;
    if (depth == 0) break;
  }
  if (at > 0) name.resize(at);
  return name.starts_with("void ") ? name.substr(5) : name;
}

// "void kernel<8>(float*)::tile" -> "tile"
std::string variable_name(const char* symbol) {
  const std::string name = demangled(symbol);
  const size_t colons = name.rfind("::");
  return colons == std::string::npos ? name : name.substr(colons + 2);
}

template <class T>
const T* at(const std::string& file, size_t offset) {
  return reinterpret_cast<const T*>(file.data() + offset);
}

void read_symbols(Module& module) {
  std::ifstream stream(module.path, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  const auto* header = at<Elf64_Ehdr>(file, 0);
  const auto* sections = at<Elf64_Shdr>(file, header->e_shoff);
  for (const Elf64_Shdr* section = sections; section != sections + header->e_shnum; ++section) {
    if (section->sh_type != SHT_SYMTAB) continue;
    const char* names = at<char>(file, sections[section->sh_link].sh_offset);
    const auto* symbols = at<Elf64_Sym>(file, section->sh_offset);
    for (const Elf64_Sym* s = symbols; s != symbols + section->sh_size / sizeof *symbols; ++s) {
      if (s->st_shndx == SHN_UNDEF) continue;
      const char* name = names + s->st_name;
      const int type = ELF64_ST_TYPE(s->st_info);
      if (type == STT_TLS) module.shared.push_back({variable_name(name), s->st_value, s->st_size});
      if (type == STT_FUNC) module.functions.push_back({name, s->st_value, s->st_size});
    }
  }
  const auto by_offset = [](const Symbol& a, const Symbol& b) { return a.offset < b.offset; };
  std::sort(module.shared.begin(), module.shared.end(), by_offset);
  std::sort(module.functions.begin(), module.functions.end(), by_offset);
}

int find_image(dl_phdr_info* info, size_t, void* result) {
  auto& [address, module] = *static_cast<std::pair<uintptr_t, Module>*>(result);
  Module found{info->dlpi_name, info->dlpi_addr, UINTPTR_MAX, 0, info->dlpi_tls_modid, 0, {}, {}};
  for (const ElfW(Phdr)* h = info->dlpi_phdr; h != info->dlpi_phdr + info->dlpi_phnum; ++h) {
    if (h->p_type == PT_TLS) found.tls_bytes = h->p_memsz;
    if (h->p_type != PT_LOAD) continue;
    found.begin = std::min(found.begin, found.base + h->p_vaddr);
    found.end = std::max(found.end, found.base + h->p_vaddr + h->p_memsz);
  }
  if (found.begin > address || address >= found.end) return 0;
  module = found;
  return 1;
}

}  // namespace

std::string Module::kernel_name(const void* kernel) const {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(kernel) - base;
  for (const Symbol& function : functions) {
    if (offset - function.offset < function.bytes) return function_name(function.name.c_str());
  }
  return "unknown kernel";
}

uintptr_t Module::tls_base() const {
  size_t index[2] = {tls_module, 0};
  return tls_bytes == 0 ? 0 : reinterpret_cast<uintptr_t>(__tls_get_addr(index));
}

const Module& module_of(const void* code) {
  static std::list<Module> modules;
  const auto address = reinterpret_cast<uintptr_t>(code);
  for (const Module& module : modules) {
    if (module.contains(address)) return module;
  }
  std::pair<uintptr_t, Module> search{address, {}};
  dl_iterate_phdr(find_image, &search);
  read_symbols(search.second);
  return modules.emplace_back(std::move(search.second));
}

}  // namespace simt
