//! Transports: TCP with noise and yamux, QUIC, relayed connections, and libp2p's in-process one for tests.

use std::time::Duration;

use libp2p::core::Transport as _;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, MemoryTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{PeerId, dns, noise, quic, relay, tcp};

use super::config::{NetError, TransportKind};
use super::metrics::NetMetrics;
use super::muxer::Yamux;
use super::read_ahead::ReadAhead;

/// TCP, noise and yamux together must be done by then. Cuts connections that are opened and say nothing.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);

type Connections = Boxed<(PeerId, StreamMuxerBox)>;

/// The transport, and the behaviour that its relayed connections need.
pub(super) fn build(
    kind: TransportKind,
    keypair: &Keypair,
    metrics: &NetMetrics,
) -> Result<(Connections, Option<relay::client::Behaviour>), NetError> {
    let noise =
        noise::Config::new(keypair).map_err(|error| NetError::Setup { part: "noise", reason: error.to_string() })?;
    let metrics = metrics.clone();
    match kind {
        TransportKind::Memory => {
            let transport = MemoryTransport::default()
                .map(move |socket, _| ReadAhead::new(socket, metrics.clone()))
                .upgrade(Version::V1Lazy)
                .authenticate(noise)
                .multiplex(Yamux)
                .timeout(UPGRADE_TIMEOUT)
                .boxed();
            Ok((transport, None))
        }
        TransportKind::Internet => {
            let (relayed, relay_client) = relay::client::new(keypair.public().to_peer_id());
            let tcp = || tcp::tokio::Transport::new(tcp::Config::new().nodelay(true));
            // Without a readable resolver configuration names cannot be dialled; numbers still can.
            let direct = match dns::tokio::Transport::system(tcp()) {
                Ok(named) => named.boxed(),
                Err(error) => {
                    tracing::warn!(%error, "no name resolution: /dns addresses will fail");
                    tcp().boxed()
                }
            };
            let streams = relayed
                .or_transport(direct)
                .map(move |socket, _| ReadAhead::new(socket, metrics.clone()))
                .upgrade(Version::V1Lazy)
                .authenticate(noise)
                .multiplex(Yamux)
                .timeout(UPGRADE_TIMEOUT);
            let quic = quic::tokio::Transport::new(quic::Config::new(keypair));
            let transport = quic
                .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
                .or_transport(streams.map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer))))
                .map(|either, _| either.into_inner())
                .boxed();
            Ok((transport, Some(relay_client)))
        }
    }
}
