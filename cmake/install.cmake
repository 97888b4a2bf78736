# SPDX-License-Identifier: MIT
# What `cmake --install` lays down beside the program: header, libraries, CMake package, pkg-config file; how it goes again;
# and the test of both.
include(CMakePackageConfigHelpers)

set(cmake_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashkda)

install(FILES ${PROJECT_SOURCE_DIR}/include/flash_kda.h TYPE INCLUDE)
list(TRANSFORM FLASH_KDA_KINDS PREPEND flash_kda_ OUTPUT_VARIABLE libraries)
install(TARGETS ${libraries} EXPORT flashkda)

install(EXPORT flashkda NAMESPACE flashkda:: FILE flashkdaTargets.cmake DESTINATION ${cmake_package_dir})
list(GET FLASH_KDA_KINDS 0 default_kind)
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
list(APPEND private_libs -lm)
list(JOIN private_libs " " private_libs)
set(public_libs)
if(default_kind STREQUAL static) # there is no shared one, so each link is static
  set(public_libs " ${private_libs}")
endif()
set(where "on the CPU")
if(FLASH_KDA_CUDA)
  set(where "on the CPU and on CUDA")
endif()
# The prefix is found from where the file lies, so that `cmake --install --prefix` may choose it; but an absolute folder for
# libraries does not follow the prefix.
if(IS_ABSOLUTE ${CMAKE_INSTALL_LIBDIR})
  set(pc_prefix ${CMAKE_INSTALL_PREFIX})
else()
  file(RELATIVE_PATH pc_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
  string(REGEX REPLACE "(.*)/$" "\${pcfiledir}/\\1" pc_prefix ${pc_prefix})
endif()
foreach(folder LIBDIR INCLUDEDIR)
  set(pc_${folder} "\${prefix}")
  cmake_path(APPEND pc_${folder} ${CMAKE_INSTALL_${folder}})
endforeach()
configure_file(${CMAKE_CURRENT_LIST_DIR}/flash_kda.pc.in ${PROJECT_BINARY_DIR}/flash_kda.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/flash_kda.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(PROJECT_IS_TOP_LEVEL)
  add_custom_target(uninstall COMMAND ${CMAKE_COMMAND} -P ${CMAKE_CURRENT_LIST_DIR}/uninstall.cmake
    WORKING_DIRECTORY ${PROJECT_BINARY_DIR})
endif()

# Instrumented libraries are not for installing, and a cross build cannot run what it installs.
if(FLASH_KDA_TESTS AND NOT FLASH_KDA_SANITIZE AND NOT FLASH_KDA_COVERAGE AND NOT CMAKE_CROSSCOMPILING)
  add_test(NAME install COMMAND ${PROJECT_SOURCE_DIR}/tests/install.sh ${PROJECT_BINARY_DIR})
  set_tests_properties(install PROPERTIES ENVIRONMENT
    "CC=${CMAKE_C_COMPILER};CXX=${CMAKE_CXX_COMPILER};NM=${CMAKE_NM};LIBDIR=${CMAKE_INSTALL_LIBDIR};CMAKE_GENERATOR=${CMAKE_GENERATOR}")
endif()
