"""A certificate authority of one test, and certificates that it signs, as the PEM files that `TlsSettings` names."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from penstock.workers.settings import TlsSettings

DAY = datetime.timedelta(days=1)


@dataclass
class Authority:
    """Writes into `folder`, under its own name."""

    folder: Path
    name: str = "ca"

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _named(self.name)
        usage = x509.BasicConstraints(ca=True, path_length=0)
        self._certificate = self._builder(self._subject, self._key, 1).add_extension(usage, critical=True)
        self.file = self._write("ca", self._certificate.sign(self._key, hashes.SHA256()))

    def settings(self, internal: bool = True, days: int = 1, names: tuple[str, ...] = ("workers.test",)) -> TlsSettings:
        """A certificate for 127.0.0.1, localhost and `names` (first), as settings."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [x509.DNSName(name) for name in (*names, "localhost")]
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = self._builder(_named("worker"), key, days)
        builder = builder.add_extension(x509.SubjectAlternativeName([*alternatives, address]), critical=False)
        cert_file = self._write("cert", builder.sign(self._key, hashes.SHA256()))
        key_file = self.folder / f"{self.name}-key.pem"
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return TlsSettings(str(cert_file), str(key_file), str(self.file), internal)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + days * DAY)
        )

    def _write(self, what: str, certificate: x509.Certificate) -> Path:
        path = self.folder / f"{self.name}-{what}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"penstock test {name}")])
