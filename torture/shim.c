/* Loaded in front of the C library (LD_PRELOAD): counts what a process does to the files of one folder, and at the operation
 * that is asked for kills it, signals it, or has the operation fail.
 *
 * A process is armed by `arm`, which Python calls through ctypes, or at its start by the environment: TORTURE_FOLDER, and
 * TORTURE_FAULT="kind number at". Unarmed, every call goes straight on. Paths are compared as they are given: the folder must
 * be absolute and free of links.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* KILL: SIGKILL before operation `at`. HALF: the same, but a write has put down half its bytes. SIGNAL: `number` is raised, and
 * the operation goes on. FAIL: this one operation fails with the errno `number`. FULL: from here on whatever takes space does.
 * NOLOCK: every flock fails, wherever the file lies in the folder. */
enum kind { OFF, KILL, HALF, SIGNAL, FAIL, FULL, NOLOCK };

static char folder[PATH_MAX];
static enum kind kind = OFF;
static int number, trace = -1;
static long at;
static atomic_long count;

void arm(const char *where, int what, int value, long when, int descriptor) {
  snprintf(folder, sizeof folder, "%s", where);
  kind = what, number = value, at = when, trace = descriptor, count = 0;
}

__attribute__((constructor)) static void arm_by_environment(void) {
  const char *where = getenv("TORTURE_FOLDER"), *fault = getenv("TORTURE_FAULT");
  int what, value;
  long when;
  if (where && fault && sscanf(fault, "%d %d %ld", &what, &value, &when) == 3) arm(where, what, value, when, -1);
}

static int inside(const char *path) {
  char full[2 * PATH_MAX], here[PATH_MAX];
  if (!path || (path[0] != '/' && !getcwd(here, sizeof here))) return 0;
  snprintf(full, sizeof full, path[0] == '/' ? "%s" : "%s/%s", path[0] == '/' ? path : here, path);
  size_t length = strlen(folder);
  return !strncmp(full, folder, length) && (full[length] == '/' || !full[length]);
}

static const char *name_of(int descriptor) {
  static _Thread_local char path[PATH_MAX];
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

/* One operation: returns the errno it is to fail with, 0 to go on, -1 for a write that is to end in its middle. */
static int step(const char *operation, const char *path, int takes_space) {
  if (kind == OFF || !inside(path)) return 0;
  if (kind == NOLOCK) return strcmp(operation, "flock") ? 0 : number;
  long own = atomic_fetch_add(&count, 1);
  if (trace >= 0) dprintf(trace, "%s %s\n", operation, path);
  if (kind == FULL) return own >= at && takes_space ? number : 0;
  if (own != at) return 0;
  if (kind == SIGNAL) raise(number);
  if (kind == FAIL) return number;
  if (kind == HALF && !strcmp(operation, "write")) return -1;
  if (kind == KILL || kind == HALF) raise(SIGKILL);
  return 0;
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define STEP(operation, path, takes_space) \
  do { int failed = kind == OFF ? 0 : step(operation, path, takes_space); if (failed > 0) return errno = failed, -1; } while (0)

#define OPEN(name, parameters, path, flags, ...) \
  int name parameters { \
    NEXT(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    if ((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) STEP("open", path, flags & O_CREAT); \
    return next(__VA_ARGS__, mode); \
  }
OPEN(open, (const char *path, int flags, ...), path, flags, path, flags)
OPEN(open64, (const char *path, int flags, ...), path, flags, path, flags)
OPEN(openat, (int base, const char *path, int flags, ...), path, flags, base, path, flags)
OPEN(openat64, (int base, const char *path, int flags, ...), path, flags, base, path, flags)

#define WRITE(name, parameters, ...) \
  ssize_t name parameters { \
    NEXT(name); \
    if (kind != OFF && descriptor != trace) { \
      int failed = step("write", name_of(descriptor), 1); \
      if (failed > 0) return errno = failed, -1; \
      if (failed < 0) size /= 2, next(__VA_ARGS__), raise(SIGKILL); \
    } \
    return next(__VA_ARGS__); \
  }
WRITE(write, (int descriptor, const void *bytes, size_t size), descriptor, bytes, size)
WRITE(pwrite, (int descriptor, const void *bytes, size_t size, off_t offset), descriptor, bytes, size, offset)
WRITE(pwrite64, (int descriptor, const void *bytes, size_t size, off64_t offset), descriptor, bytes, size, offset)

#define ON_PATH(name, path, takes_space, parameters, ...) \
  int name parameters { NEXT(name); STEP(#name, path, takes_space); return next(__VA_ARGS__); }
#define ON_FILE(name, parameters, ...) \
  int name parameters { NEXT(name); STEP(#name, name_of(descriptor), 0); return next(__VA_ARGS__); }
ON_PATH(rename, to, 0, (const char *from, const char *to), from, to)
ON_PATH(link, to, 1, (const char *from, const char *to), from, to)
ON_PATH(symlink, to, 1, (const char *from, const char *to), from, to)
ON_PATH(unlink, path, 0, (const char *path), path)
ON_PATH(rmdir, path, 0, (const char *path), path)
ON_PATH(mkdir, path, 1, (const char *path, mode_t mode), path, mode)
ON_PATH(chmod, path, 0, (const char *path, mode_t mode), path, mode)
ON_FILE(fsync, (int descriptor), descriptor)
ON_FILE(fchmod, (int descriptor, mode_t mode), descriptor, mode)
ON_FILE(ftruncate, (int descriptor, off_t size), descriptor, size)
ON_FILE(ftruncate64, (int descriptor, off64_t size), descriptor, size)
ON_FILE(flock, (int descriptor, int operation), descriptor, operation)
