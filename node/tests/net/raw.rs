//! A peer that speaks the wire by hand, and so can say what no node would.

use bytes::Bytes;
use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use libp2p::core::upgrade::Version;
use libp2p::core::{Transport as _, transport::MemoryTransport};
use libp2p::identity::Keypair;
use libp2p::swarm::{NetworkBehaviour, Stream, StreamProtocol, Swarm, SwarmEvent};
use libp2p::{Multiaddr, identify, kad, noise, yamux};
use libp2p_stream::{Control, OpenStreamError};
use prost::Message as _;
use sundara_proto::crypto::Signed;
use sundara_proto::names;
use sundara_proto::pb;
use sundara_proto::wire::{self, limit};
use tokio::sync::mpsc;

use crate::kit::{certificate, hotkey, network, now, seed};

pub const GOSSIP: &str = "/meshsub/1.2.0";

#[derive(NetworkBehaviour)]
pub struct Behaviour {
    stream: libp2p_stream::Behaviour,
    identify: identify::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
}

type Job = Box<dyn FnOnce(&mut Swarm<Behaviour>) + Send>;

/// The peer. Its swarm runs until this is dropped.
pub struct Raw {
    pub control: Control,
    jobs: mpsc::Sender<Job>,
    connected: tokio::sync::watch::Receiver<bool>,
}

impl Raw {
    /// A peer with the node key of this number; connected on the level of libp2p, not certified.
    pub async fn connect(number: u32, to: &Multiaddr) -> Self {
        let key = Keypair::ed25519_from_bytes(seed(2, number)).unwrap();
        let peer = key.public().to_peer_id();
        let transport = MemoryTransport::default()
            .upgrade(Version::V1)
            .authenticate(noise::Config::new(&key).unwrap())
            .multiplex(yamux::Config::default())
            .boxed();
        let kad_name = StreamProtocol::try_from_owned(names::kad_protocol(&network())).unwrap();
        let mut kad = kad::Behaviour::with_config(peer, kad::store::MemoryStore::new(peer), kad::Config::new(kad_name));
        kad.set_mode(Some(kad::Mode::Server));
        let identify = identify::Config::new(names::identify_protocol(&network()), key.public());
        let stream = libp2p_stream::Behaviour::new();
        let mut control = stream.new_control();
        // gossipsub listens only to peers to which it can talk itself.
        let mut gossip = control.accept(StreamProtocol::new(GOSSIP)).unwrap();
        tokio::spawn(async move {
            while let Some((_, mut stream)) = gossip.next().await {
                tokio::spawn(async move { ended(&mut stream).await });
            }
        });
        let behaviour = Behaviour { stream, identify: identify::Behaviour::new(identify), kad };
        let swarm_config = libp2p::swarm::Config::with_tokio_executor()
            .with_idle_connection_timeout(std::time::Duration::from_secs(60));
        let mut swarm = Swarm::new(transport, behaviour, peer, swarm_config);
        swarm.dial(to.clone()).unwrap();
        let (jobs, mut queue) = mpsc::channel::<Job>(16);
        let (tell, mut connected) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    job = queue.recv() => match job {
                        Some(job) => job(&mut swarm),
                        None => return,
                    },
                    event = swarm.select_next_some() => match event {
                        SwarmEvent::ConnectionEstablished { .. } => drop(tell.send(true)),
                        SwarmEvent::ConnectionClosed { .. } => drop(tell.send(false)),
                        _ => {}
                    },
                }
            }
        });
        connected.wait_for(|up| *up).await.unwrap();
        Self { control, jobs, connected }
    }

    /// The same, after an honest handshake.
    pub async fn certified(number: u32, to: &Multiaddr) -> Self {
        let mut raw = Self::connect(number, to).await;
        let answer = raw.handshake(&hello(number), to).await.unwrap();
        assert_eq!(answer.refusal, "");
        raw
    }

    /// Shows a Hello and returns the answer; `None` when the stream ends without one.
    pub async fn handshake(&mut self, hello: &pb::Hello, to: &Multiaddr) -> Option<pb::Hello> {
        let mut stream = self.open(&names::cert_protocol(&network()), to).await.unwrap();
        stream.write_all(&wire::encode_frame(hello, limit::HELLO).unwrap()).await.ok()?;
        stream.flush().await.ok()?;
        let answer = read_frame(&mut stream).await.map(|body| pb::Hello::decode(body).unwrap());
        stream.close().await.ok();
        answer
    }

    pub async fn open(&mut self, protocol: &str, to: &Multiaddr) -> Result<Stream, OpenStreamError> {
        let Some(libp2p::multiaddr::Protocol::P2p(peer)) = to.iter().last() else { panic!("{to} names no peer") };
        self.control.open_stream(peer, StreamProtocol::try_from_owned(protocol.to_owned()).unwrap()).await
    }

    pub async fn rpc(&mut self, to: &Multiaddr) -> Stream {
        self.open(&names::rpc_protocol(&network(), 1), to).await.unwrap()
    }

    /// Does something with the swarm.
    pub async fn with<T: Send + 'static>(&self, job: impl FnOnce(&mut Behaviour) -> T + Send + 'static) -> T {
        let (done, answer) = tokio::sync::oneshot::channel();
        let job: Job = Box::new(move |swarm| drop(done.send(job(swarm.behaviour_mut()))));
        self.jobs.send(job).await.unwrap_or_else(|_| panic!("the swarm has ended"));
        answer.await.unwrap()
    }

    /// A stream of gossipsub, on which anything can be said.
    pub async fn gossip(&mut self, to: &Multiaddr) -> Stream {
        self.open(GOSSIP, to).await.unwrap()
    }

    pub async fn kad<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut kad::Behaviour<kad::store::MemoryStore>) -> T + Send + 'static,
    ) -> T {
        self.with(|behaviour| job(&mut behaviour.kad)).await
    }

    /// Waits until the node has cut us off.
    pub async fn cut(&mut self) {
        self.connected.wait_for(|up| !up).await.unwrap();
    }
}

/// The honest Hello of a number.
pub fn hello(number: u32) -> pb::Hello {
    let certificate = Signed::sign(&network(), &hotkey(number), certificate(number));
    pb::Hello {
        certificate: Some(certificate.to_wire()),
        version_min: 1,
        version_max: 1,
        agent: "raw/1".to_owned(),
        now_ms: now().0,
        refusal: String::new(),
        instance: Bytes::from_static(&[1; 16]),
    }
}

/// The next frame's body; `None` at the end.
pub async fn read_frame(stream: &mut Stream) -> Option<Bytes> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.ok()?;
    let mut body = vec![0; u32::from_le_bytes(prefix) as usize];
    stream.read_exact(&mut body).await.ok()?;
    Some(body.into())
}

/// Reads until the other side has ended the stream.
pub async fn ended(stream: &mut Stream) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.ok();
}

/// gossipsub's own frame, as far as it is needed here.
#[derive(prost::Message)]
struct GossipRpc {
    #[prost(message, repeated, tag = "2")]
    publish: Vec<GossipPublish>,
}

#[derive(prost::Message)]
struct GossipPublish {
    #[prost(bytes = "vec", optional, tag = "2")]
    data: Option<Vec<u8>>,
    #[prost(string, required, tag = "4")]
    topic: String,
}

/// Publishes bytes on a topic.
pub async fn publish(stream: &mut Stream, topic: String, data: Vec<u8>) {
    let rpc = GossipRpc { publish: vec![GossipPublish { data: Some(data), topic }] };
    stream.write_all(&rpc.encode_length_delimited_to_vec()).await.unwrap();
    stream.flush().await.unwrap();
}
