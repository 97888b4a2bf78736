# SPDX-License-Identifier: MIT
# What `cmake --install` lays down beside the program: header, libraries, CMake package, pkg-config file; and its test.
include(CMakePackageConfigHelpers)

set(cmake_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashkda)

install(FILES ${PROJECT_SOURCE_DIR}/include/flash_kda.h TYPE INCLUDE)
set_target_properties(flash_kda_shared PROPERTIES EXPORT_NAME shared)
set_target_properties(flash_kda_static PROPERTIES EXPORT_NAME static)
install(TARGETS flash_kda_shared flash_kda_static EXPORT flashkda)

install(EXPORT flashkda NAMESPACE flashkda:: FILE flashkdaTargets.cmake DESTINATION ${cmake_package_dir})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/flashkdaConfig.cmake.in
  ${PROJECT_BINARY_DIR}/flashkdaConfig.cmake INSTALL_DESTINATION ${cmake_package_dir})
# Before 1.0 the soname changes with the minor version, and so does what a program may ask for.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashkdaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashkdaConfig.cmake ${PROJECT_BINARY_DIR}/flashkdaConfigVersion.cmake
  DESTINATION ${cmake_package_dir})

# A static link needs threads; and with CUDA its runtime, which the shared library has inside, and libstdc++ for what nvcc
# generates.
set(private_libs -pthread)
if(FLASH_KDA_CUDA)
  cmake_path(GET CUDA_cudart_static_LIBRARY PARENT_PATH cudart_dir)
  list(APPEND private_libs -L${cudart_dir} -lcudart_static -lstdc++ -lpthread -ldl -lrt)
endif()
list(JOIN private_libs " " private_libs)
set(where "on the CPU")
if(FLASH_KDA_CUDA)
  set(where "on the CPU and on CUDA")
endif()
# The prefix is found from where the file lies, so that `cmake --install --prefix` may choose it.
file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" prefix_from_pc ${prefix_from_pc})
configure_file(${CMAKE_CURRENT_LIST_DIR}/flash_kda.pc.in ${PROJECT_BINARY_DIR}/flash_kda.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/flash_kda.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

# Instrumented libraries are not for installing, and a cross build cannot run what it installs.
if(FLASH_KDA_TESTS AND NOT FLASH_KDA_SANITIZE AND NOT FLASH_KDA_COVERAGE AND NOT CMAKE_CROSSCOMPILING)
  add_test(NAME install COMMAND ${PROJECT_SOURCE_DIR}/examples/test-install.sh ${PROJECT_BINARY_DIR})
  set_tests_properties(install PROPERTIES ENVIRONMENT
    "CC=${CMAKE_C_COMPILER};NM=${CMAKE_NM};LIBDIR=${CMAKE_INSTALL_LIBDIR};CMAKE_GENERATOR=${CMAKE_GENERATOR}")
endif()
