# SPDX-License-Identifier: MIT
# Builds for AArch64 with Debian's cross compiler; programs run under qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

# DLPack is one header that serves every machine, but it lies among the headers of the build machine,
# which a cross compiler must not see.
if(EXISTS /usr/include/dlpack)
  set(DLPACK_INCLUDE_DIR ${CMAKE_BINARY_DIR}/dlpack-include CACHE PATH "where dlpack/dlpack.h is")
  file(COPY /usr/include/dlpack DESTINATION ${DLPACK_INCLUDE_DIR})
endif()
