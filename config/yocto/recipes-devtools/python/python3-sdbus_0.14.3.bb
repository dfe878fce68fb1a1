SUMMARY = "D-Bus by systemd's sd-bus"
LICENSE = "LGPL-2.1-or-later"
LIC_FILES_CHKSUM = "file://COPYING.LESSER;md5=4fbd65380cdd255951079008b364516c"

SRC_URI[sha256sum] = "4ec4fa4108629bae5ab2775e5575b0251fdb555d4a3613c9ddb37fc73f882983"

PYPI_PACKAGE = "sdbus"

inherit features_check pkgconfig pypi setuptools3

REQUIRED_DISTRO_FEATURES = "systemd"
DEPENDS += "systemd"

RDEPENDS:${PN} = " \
    python3-asyncio \
    python3-core \
    python3-logging \
    python3-numbers \
    python3-threading \
"
