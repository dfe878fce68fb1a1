SUMMARY = "Serialization and validation by type annotations"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE;md5=c21402f8022478021f697044388b97c4"

# Later versions want a newer setuptools than scarthgap's.
SRC_URI[sha256sum] = "604037e7cd475345848116e89c553aa9a233259733ab51986ac924ab1b976f8e"

PYPI_PACKAGE = "msgspec"

inherit pypi setuptools3

RDEPENDS:${PN} = " \
    python3-core \
    python3-datetime \
    python3-netclient \
    python3-numbers \
"

BBCLASSEXTEND = "native nativesdk"
