# SPDX-License-Identifier: MIT
# Whether the CUDA backend is built, and for what: turns FLASH_KDA_CUDA from ON, OFF or AUTO into ON or OFF and says why;
# gives CMAKE_CUDA_ARCHITECTURES the GPUs to compile for, and FLASH_KDA_SM90 whether Hopper is among them.
set(FLASH_KDA_CUDA AUTO CACHE STRING "build the CUDA backend: ON, OFF or AUTO, where nvcc 12.8 or later is found")
set_property(CACHE FLASH_KDA_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT FLASH_KDA_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "FLASH_KDA_CUDA is '${FLASH_KDA_CUDA}', expected ON, OFF or AUTO")
endif()
set(oldest_nvcc 12.8) # the first that knows sm_100 and sm_120

# Looked for again each time: a toolkit may have been installed since.
if(FLASH_KDA_CUDA AND NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)
  include(CheckLanguage)
  check_language(CUDA)
endif()

set(nvcc_version)
set(no_cuda)
if(NOT FLASH_KDA_CUDA)
  set(no_cuda "FLASH_KDA_CUDA is ${FLASH_KDA_CUDA}")
elseif(NOT CMAKE_CUDA_COMPILER)
  string(CONCAT no_cuda "no nvcc that works was found; CMAKE_CUDA_COMPILER may name one, and NVIDIA's packages for Debian have "
    "cuda-toolkit-13 (Debian's own nvidia-cuda-toolkit is too old)")
else()
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_version)
  string(REGEX REPLACE ".*release ([0-9.]+).*" "\\1" nvcc_version "${nvcc_version}")
  if(nvcc_version VERSION_LESS oldest_nvcc)
    set(no_cuda "${CMAKE_CUDA_COMPILER} is ${nvcc_version}, expected ${oldest_nvcc} or later")
  endif()
endif()

if(no_cuda)
  if(FLASH_KDA_CUDA AND NOT FLASH_KDA_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FLASH_KDA_CUDA is ${FLASH_KDA_CUDA}, but ${no_cuda}")
  endif()
  message(STATUS "CUDA backend: no (${no_cuda})")
  set(FLASH_KDA_CUDA OFF)
  return()
endif()

# One kind of GPU compiles in less time: CUDAARCHS=90a-real or -D CMAKE_CUDA_ARCHITECTURES=90a-real for Hopper.
set(every_gpu 80-real 90a-real 100-real 120)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES ${every_gpu} CACHE STRING "GPUs to compile for")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

if(CMAKE_CUDA_ARCHITECTURES MATCHES "^all")
  set(CMAKE_CUDA_ARCHITECTURES ${every_gpu}) # nvcc's "all" begins before the backend does
elseif(CMAKE_CUDA_ARCHITECTURES STREQUAL "native")
  if(NOT CMAKE_CUDA_ARCHITECTURES_NATIVE)
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES is native, but this machine shows nvcc no GPU; expected a list such as "
      "90a-real")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
endif()
foreach(gpu IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(NOT gpu MATCHES "^([0-9]+)[af]?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES has ${gpu}; expected GPUs from 80 on, the first that the CUDA backend "
      "runs on")
  endif()
endforeach()

# Hopper's level exists as sm_90a alone. Whoever names Hopper in another way gets it too.
set(FLASH_KDA_SM90 OFF)
set(levels "level sm80 alone; 90a-real in CMAKE_CUDA_ARCHITECTURES adds Hopper's")
if(CMAKE_CUDA_ARCHITECTURES MATCHES "(^|;)90[af]?(-real|-virtual)?(;|$)")
  set(FLASH_KDA_SM90 ON)
  set(levels "levels sm80 and sm90")
endif()
list(JOIN CMAKE_CUDA_ARCHITECTURES " " gpus)
message(STATUS "CUDA backend: yes (nvcc ${nvcc_version}), for GPUs ${gpus}: ${levels}")
set(FLASH_KDA_CUDA ON)
