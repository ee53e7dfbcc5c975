/* For LD_PRELOAD: a clock that runs backwards, and slow writes below a folder.

   CLOCK_BACKWARDS  seconds that the time of day goes back in each real second
   SLOW_FOLDER      writes to files below it take a microsecond per SLOW_BYTES */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static int (*real_clock)(clockid_t, struct timespec *);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static double started, speed;
static const char *folder;
static size_t bytes = 1;

static double now(clockid_t id) {
  struct timespec t;
  real_clock(id, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

__attribute__((constructor)) static void start(void) {
  const char *back = getenv("CLOCK_BACKWARDS"), *slow = getenv("SLOW_BYTES");
  real_clock = dlsym(RTLD_NEXT, "clock_gettime");
  real_write = dlsym(RTLD_NEXT, "write");
  real_writev = dlsym(RTLD_NEXT, "writev");
  speed = back ? 1 + atof(back) : 0;
  folder = getenv("SLOW_FOLDER");
  if (slow) bytes = atol(slow);
  started = now(CLOCK_MONOTONIC);
}

int clock_gettime(clockid_t id, struct timespec *t) {
  int code;
  if (!real_clock) real_clock = dlsym(RTLD_NEXT, "clock_gettime");
  code = real_clock(id, t);
  if (code == 0 && speed && started && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
    double shown = t->tv_sec + t->tv_nsec / 1e9 - speed * (now(CLOCK_MONOTONIC) - started);
    t->tv_sec = (time_t)shown;
    t->tv_nsec = (long)((shown - (time_t)shown) * 1e9);
  }
  return code;
}

int gettimeofday(struct timeval *t, void *zone) {
  struct timespec exact;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &exact);
  t->tv_sec = exact.tv_sec;
  t->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *t) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (t) *t = exact.tv_sec;
  return exact.tv_sec;
}

static void delay(int file, size_t size) {
  char link[64], path[4096];
  ssize_t length;
  if (!folder) return;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  length = readlink(link, path, sizeof path - 1);
  if (length < 0) return;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder)) == 0) usleep(size / bytes);
}

ssize_t write(int file, const void *content, size_t size) {
  if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
  delay(file, size);
  return real_write(file, content, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  size_t size = 0;
  int i;
  if (!real_writev) real_writev = dlsym(RTLD_NEXT, "writev");
  for (i = 0; i < count; i++) size += parts[i].iov_len;
  delay(file, size);
  return real_writev(file, parts, count);
}
