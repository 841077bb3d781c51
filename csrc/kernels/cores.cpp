// SPDX-License-Identifier: Apache-2.0
#include "kernels/cores.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>
#endif

namespace llmkern {

namespace {

// 0: not said.
int cores_of_environment() {
  const char* text = std::getenv("LLMKERN_CORES");
  if (text == nullptr || *text == '\0') return 0;
  char* end;
  const long cores = std::strtol(text, &end, 10);
  if (*end == '\0' && cores > 0 && cores < (1 << 20)) return static_cast<int>(cores);
  throw std::invalid_argument("llmkern.cpu: expected LLMKERN_CORES to be a number above 0, got '" + std::string(text) +
                              "'");
}

#ifdef __linux__

int rounded_up(double quota, double period) { return std::max(1, static_cast<int>(std::ceil(quota / period))); }

// Version 2, of one group: "max 100000" or "150000 100000".
int quota_of_group(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return rounded_up(std::strtod(quota.c_str(), nullptr), period);
}

// Version 1, of one group.
int quota_of_old_group(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return 0;
  return rounded_up(quota, period);
}

int fewer(int a, int b) { return a == 0 || (b != 0 && b < a) ? b : a; }

// The least quota of a group and of those that it lies in.
template <class Quota>
int least_quota(const std::string& top, std::string group, const Quota& quota_of) {
  int cores = quota_of(top);
  for (; group.size() > 1; group.resize(group.rfind('/'))) cores = fewer(cores, quota_of(top + group));
  return cores;
}

// Whether OpenMP binds each thread to a core of its own: then the calling thread's says nothing about the process.
bool threads_are_bound() {
  for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    if (strcasecmp(value, "false") != 0 && strcasecmp(value, "disabled") != 0 && strcasecmp(value, "none") != 0) {
      return true;
    }
  }
  return false;
}

int cores_by_system(int quota) {
  static const bool bound = threads_are_bound();
  static const int online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  return std::max(1, fewer(bound ? online : cores_of_affinity(), quota));
}

int64_t milliseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

#endif

}  // namespace

#ifdef __linux__

int cores_of_affinity() {
  // Larger masks than cpu_set_t, of 1024 cores, exist.
  for (size_t sets = 1; sets <= 64; sets *= 2) {
    std::vector<cpu_set_t> mask(sets);
    const size_t bytes = sets * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, mask.data()) == 0) return std::max(1, CPU_COUNT_S(bytes, mask.data()));
  }
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

int cores_of_quota(const char* root) {
  std::ifstream groups(std::string(root) + "/proc/self/cgroup");
  const std::string mount = std::string(root) + "/sys/fs/cgroup";
  int cores = 0;
  for (std::string line; std::getline(groups, line);) {  // "0::/group", or "4:cpu,cpuacct:/group" in version 1
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") cores = fewer(cores, least_quota(mount, group, quota_of_group));
    if (controllers.find(",cpu,") != std::string::npos) {
      cores = fewer(cores, least_quota(mount + "/cpu", group, quota_of_old_group));
    }
  }
  return cores;
}

int usable_cores() {
  static const int wanted = cores_of_environment(), quota = cores_of_quota("");
  if (wanted > 0) return wanted;
  constexpr int64_t kPatience = 100;
  static thread_local int cores = 0;
  static thread_local int64_t looked_up = 0;
  const int64_t now = milliseconds();
  if (cores == 0 || now - looked_up > kPatience) {
    cores = cores_by_system(quota);
    looked_up = now;
  }
  return cores;
}

#else

int cores_of_affinity() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

int cores_of_quota(const char*) { return 0; }

int usable_cores() {
  static const int wanted = cores_of_environment();
  return wanted > 0 ? wanted : cores_of_affinity();
}

#endif

}  // namespace llmkern
