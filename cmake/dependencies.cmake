# SPDX-License-Identifier: MIT
# Finds what the chosen parts are built with. What is missing is said at once, each with its package in Debian.
include(CheckLanguage)

set(missing)
macro(expect found what package)
  if(NOT ${found})
    string(APPEND missing "\n  ${what}: ${package}")
  endif()
endmacro()

find_package(Threads)
expect(Threads_FOUND "POSIX threads" libc6-dev)
find_path(DLPACK_INCLUDE_DIR dlpack/dlpack.h)
expect(DLPACK_INCLUDE_DIR "DLPack's header dlpack/dlpack.h (or -D DLPACK_INCLUDE_DIR=, the folder that holds dlpack/)"
  libdlpack-dev)

# cmocka comes from the build machine, so a cross build does without the tests that need it.
set(FLASH_KDA_UNIT_TESTS OFF)
if(FLASH_KDA_TESTS AND NOT CMAKE_CROSSCOMPILING)
  set(FLASH_KDA_UNIT_TESTS ON)
endif()

if(FLASH_KDA_CLI OR FLASH_KDA_UNIT_TESTS)
  find_package(PkgConfig QUIET)
  expect(PKG_CONFIG_FOUND pkg-config pkgconf)
endif()
macro(expect_module prefix module what package)
  if(PKG_CONFIG_FOUND)
    pkg_check_modules(${prefix} QUIET IMPORTED_TARGET ${module})
  endif()
  expect(${prefix}_FOUND ${what} ${package})
endmacro()
if(FLASH_KDA_CLI)
  expect_module(JANSSON jansson "jansson (or -D FLASH_KDA_CLI=OFF)" libjansson-dev)
endif()
if(FLASH_KDA_UNIT_TESTS)
  expect_module(CMOCKA cmocka "cmocka (or -D FLASH_KDA_TESTS=OFF)" libcmocka-dev)
  check_language(CXX)
  expect(CMAKE_CXX_COMPILER "a C++ compiler (or -D FLASH_KDA_TESTS=OFF)" g++)
endif()
if(FLASH_KDA_PYTHON)
  find_package(Python 3.10 COMPONENTS Interpreter Development.Module)
  expect(Python_FOUND "Python 3.10 or later with its headers" python3-dev)
endif()

if(missing)
  message(FATAL_ERROR "These are missing; after each, Debian's package that has it:${missing}")
endif()
