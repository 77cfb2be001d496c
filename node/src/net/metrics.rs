//! What the network counts. One struct, registered once by whoever serves metrics.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident: $kind:ident = $help:literal;)*) => {
        /// Counters and gauges of the network. Cheap to clone; clones count together. Names as registered are
        /// `net_<field>`, counters with `_total`.
        #[derive(Clone, Debug, Default)]
        pub struct NetMetrics {
            $($(#[$doc])* pub $name: $kind,)*
        }

        impl NetMetrics {
            /// Puts all of them into a registry under the prefix `net`.
            pub fn register(&self, registry: &mut Registry) {
                let registry = registry.sub_registry_with_prefix("net");
                $(registry.register(stringify!($name), $help, self.$name.clone());)*
            }
        }
    };
}

metrics! {
    /// Open connections.
    connections: Gauge = "Open connections";
    /// Peers with a valid certificate.
    peers_certified: Gauge = "Connected peers with a valid certificate";
    /// Peers in the table.
    peers_known: Gauge = "Peers known, connected or not";
    /// Bytes sent over TCP, with what noise and yamux add.
    tcp_bytes_out: Counter = "Bytes sent over TCP, relayed connections included";
    /// Bytes received over TCP, with what noise and yamux add.
    tcp_bytes_in: Counter = "Bytes received over TCP, relayed connections included";
    /// Connections established since the start.
    connections_opened: Counter = "Connections established";
    /// Inbound connections that failed or were refused before they were established.
    connections_refused: Counter = "Inbound connections refused or failed before they were established";
    /// Dials that failed.
    dials_failed: Counter = "Outgoing connections that failed";
    /// Certificates refused, by either side.
    handshakes_refused: Counter = "Certificate handshakes that ended in a refusal";
    /// Handshakes that ended without an answer.
    handshakes_failed: Counter = "Certificate handshakes that timed out or broke";
    /// Streams of peers that were dropped by a limit or for want of a certificate.
    streams_refused: Counter = "Inbound streams refused";
    /// Requests handed to a service.
    rpc_requests_in: Counter = "Requests of peers handed to a service";
    /// Requests made of peers.
    rpc_requests_out: Counter = "Requests made of peers";
    /// Requests of peers that were refused: not served, or a full queue.
    rpc_refused: Counter = "Requests of peers refused";
    /// Request streams that ended because the peer broke the protocol or stalled.
    rpc_streams_broken: Counter = "Request streams ended by a fault of the peer";
    /// Gossip handed to subscribers.
    gossip_delivered: Counter = "Gossip messages that were valid";
    /// Gossip that anyone can see is wrong; its sender is scored down.
    gossip_rejected: Counter = "Gossip messages rejected";
    /// Gossip that this node does not pass on, without blame.
    gossip_ignored: Counter = "Gossip messages ignored";
    /// Valid gossip that a subscriber was too slow for.
    gossip_lagged: Counter = "Gossip messages dropped because a subscriber lagged";
    /// Gossip published here.
    gossip_published: Counter = "Gossip messages published by this node";
    /// DHT records stored for others.
    dht_records_stored: Counter = "DHT records accepted from peers";
    /// DHT records of peers that were refused.
    dht_records_refused: Counter = "DHT records refused";
    /// Blob streams opened by peers and handed on.
    blob_streams_in: Counter = "Blob streams opened by peers";
    /// Round streams of peers.
    round_streams_in: Counter = "Map-reduce streams opened by peers";
    /// Events that found their channel full.
    events_dropped: Counter = "Peer events dropped because a subscriber lagged";
}
