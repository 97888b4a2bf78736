# SPDX-License-Identifier: MIT
# cmake --build BUILD --target uninstall: removes what the last `cmake --install BUILD` wrote. Runs in BUILD.
if(NOT EXISTS install_manifest.txt)
  message(FATAL_ERROR "There is no ${CMAKE_CURRENT_BINARY_DIR}/install_manifest.txt, so nothing was installed from here")
endif()

file(STRINGS install_manifest.txt files)
foreach(file IN LISTS files)
  set(file $ENV{DESTDIR}${file})
  message(STATUS "Removing ${file}")
  file(REMOVE ${file})
  # The folder of the CMake package is nobody else's.
  cmake_path(GET file PARENT_PATH folder)
  file(GLOB left ${folder}/*)
  if(folder MATCHES "/flashkda$" AND NOT left)
    file(REMOVE_RECURSE ${folder})
  endif()
endforeach()
file(REMOVE install_manifest.txt)
