use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::*;

const PHRASE: &str = "old leopard transfer rib spatial phone calm indicate online fire caution review";
const ADDRESS: &str = "5HDvhV6WDCjCKyrXqGQSDYqQAzkzabNhctmiDYEqgBC66BsX";
/// The development phrase of every Substrate chain, its seed and its address.
const DEV_SEED: &str = "0xfac7959dbfe72f052e5a0c3c8d6530f202b02fd8f9f5ca3580ec8deb7797479e";
const DEV_ADDRESS: &str = "5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV";

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn write_private(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn names(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_phrase_makes_the_hotkey_that_btwallet_makes() {
    let dir = dir();
    let path = dir.path().join("hotkey");
    let made = import_hotkey(&path, &format!("  {}\n", PHRASE.replace(' ', "  "))).unwrap();
    assert_eq!(made.hotkey().to_string(), ADDRESS);
    assert_eq!(load_hotkey(&path).unwrap().hotkey(), made.hotkey());

    let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let public = format!("0x{}", hex::encode(made.hotkey().0));
    assert_eq!(json["accountId"], public);
    assert_eq!(json["publicKey"], public);
    assert_eq!(json["secretPhrase"], PHRASE);
    assert_eq!(json["ss58Address"], ADDRESS);
    assert_eq!(json["secretSeed"].as_str().unwrap().len(), 66);

    assert!(matches!(import_hotkey(&dir.path().join("other"), "not a phrase"), Err(KeyError::Phrase)));
}

#[test]
fn every_secret_of_the_layout_is_read_in_btwallets_order() {
    use sp_core::Pair as _;
    let dir = dir();
    let path = dir.path().join("hotkey");
    let (pair, _) = sp_core::sr25519::Pair::from_phrase(PHRASE, None).unwrap();
    let private = format!("0x{}", hex::encode(pair.to_raw_vec()));

    write_private(&path, &format!(r#"{{"secretSeed":"{DEV_SEED}","ss58Address":"{DEV_ADDRESS}"}}"#));
    assert_eq!(load_hotkey(&path).unwrap().hotkey().to_string(), DEV_ADDRESS);
    write_private(&path, &format!(r#"{{"privateKey":"{private}","unknown":1}}"#));
    assert_eq!(load_hotkey(&path).unwrap().hotkey().to_string(), ADDRESS);
    write_private(&path, &format!(r#"{{"privateKey":"{private}","secretSeed":"{DEV_SEED}"}}"#));
    assert_eq!(load_hotkey(&path).unwrap().hotkey().to_string(), DEV_ADDRESS, "the seed comes before the private key");
    write_private(&path, &format!(r#"{{"secretPhrase":"{PHRASE}","secretSeed":"{DEV_SEED}"}}"#));
    assert_eq!(load_hotkey(&path).unwrap().hotkey().to_string(), ADDRESS, "the phrase comes first");

    write_private(&path, &format!(r#"{{"ss58Address":"{ADDRESS}"}}"#));
    assert!(matches!(load_hotkey(&path), Err(KeyError::PublicOnly { .. })));
    let shown = show_hotkey(&path).unwrap();
    assert_eq!((shown.hotkey.to_string().as_str(), shown.has_phrase), (ADDRESS, false));
}

#[test]
fn a_seed_alone_makes_a_file() {
    let dir = dir();
    let path = dir.path().join("hotkey");
    let seed: [u8; 32] = hex::decode(&DEV_SEED[2..]).unwrap().try_into().unwrap();
    assert_eq!(write_hotkey_seed(&path, &seed).unwrap().hotkey().to_string(), DEV_ADDRESS);
    assert_eq!(load_hotkey(&path).unwrap().hotkey().to_string(), DEV_ADDRESS);
    assert!(!show_hotkey(&path).unwrap().has_phrase);
    assert!(matches!(write_hotkey_seed(&path, &seed), Err(KeyError::Exists { .. })));
}

#[test]
fn damaged_and_encrypted_files_are_refused_without_showing_a_secret() {
    let dir = dir();
    let path = dir.path().join("hotkey");
    let seed = &DEV_SEED[2..];
    for content in [
        "".to_owned(),
        "{".to_owned(),
        seed.to_owned(),
        format!(r#"{{"secretSeed":"{seed}00"}}"#),
        format!(r#"{{"secretSeed":{seed}}}"#),
        format!(r#"{{"secretPhrase":"{seed}"}}"#),
        format!(r#"{{"secretSeed":"{seed}","ss58Address":"{ADDRESS}"}}"#),
        format!(r#"{{"secretSeed":"{seed}","ss58Address":"{seed}"}}"#),
        "x".repeat(1 << 20),
    ] {
        write_private(&path, &content);
        let error = load_hotkey(&path).unwrap_err();
        assert!(matches!(error, KeyError::Malformed { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains(seed), "{error}");
    }
    for (content, scheme) in [("$NACL0123", "$NACL"), ("$ANSIBLE_VAULT;1.1", "$ANSIBLE_VAULT")] {
        write_private(&path, content);
        let error = load_hotkey(&path).unwrap_err().to_string();
        assert!(error.contains(scheme) && error.contains("decrypted"), "{error}");
    }
}

#[test]
fn a_key_file_is_never_overwritten() {
    let dir = dir();
    for (name, create) in [
        ("hotkey", (|path| create_hotkey(path).map(drop)) as fn(&Path) -> Result<(), KeyError>),
        ("node.key", |path| create_node_key(path).map(drop)),
    ] {
        let path = dir.path().join(name);
        create(&path).unwrap();
        let before = fs::read(&path).unwrap();
        assert!(matches!(create(&path), Err(KeyError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), before);

        // Neither what a link names nor the dangling link itself.
        let link = dir.path().join(format!("{name}.link"));
        symlink(&path, &link).unwrap();
        assert!(matches!(create(&link), Err(KeyError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), before);
        let target = dir.path().join(format!("{name}.absent"));
        let dangling = dir.path().join(format!("{name}.dangling"));
        symlink(&target, &dangling).unwrap();
        assert!(matches!(create(&dangling), Err(KeyError::Exists { .. })));
        assert!(!target.exists());
    }
    let hidden: Vec<_> = names(dir.path()).into_iter().filter(|p| p.to_string_lossy().contains(".new-")).collect();
    assert!(hidden.is_empty(), "no secret lies under a second name: {hidden:?}");
}

#[test]
fn racing_creators_agree_on_one_key() {
    let dir = dir();
    let path = dir.path().join("hotkey");
    let made = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| load_or_create_hotkey(&path).unwrap().hotkey())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(made.iter().all(|hotkey| *hotkey == made[0]), "{made:?}");
    assert_eq!(names(dir.path()), [path]);
}

#[test]
fn others_may_not_read_a_key() {
    let dir = dir();
    let path = dir.path().join("deep/er/hotkey");
    create_hotkey(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);

    for loose in [0o640, 0o604, 0o660, 0o644, 0o610] {
        fs::set_permissions(&path, fs::Permissions::from_mode(loose)).unwrap();
        let error = load_hotkey(&path).unwrap_err();
        assert!(matches!(error, KeyError::Exposed { mode, .. } if mode == loose));
        assert!(error.to_string().contains(&format!("chmod 600 {}", path.display())), "{error}");
        assert!(load_or_create_hotkey(&path).is_err(), "an exposed key is not replaced by a new one");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    assert!(load_hotkey(&path).is_ok());
    assert!(load_hotkey(dir.path()).is_err(), "a directory is no key");
}

#[test]
fn node_keys_come_back_as_they_were_made() {
    let dir = dir();
    let path = dir.path().join("node.key");
    let made = load_or_create_node_key(&path).unwrap();
    assert_eq!(load_or_create_node_key(&path).unwrap().node_id(), made.node_id());
    assert_eq!(fs::read(&path).unwrap().len(), 65);
    write_private(&path, "abc");
    assert!(matches!(load_node_key(&path), Err(KeyError::Malformed { .. })));
    assert!(matches!(load_or_create_node_key(&path), Err(KeyError::Malformed { .. })), "a damaged key is not replaced");
    assert!(matches!(load_node_key(&dir.path().join("none")), Err(KeyError::Missing { .. })));
}

/// Not a test of its own: the child of the one below. Makes keys until it is killed.
#[test]
fn child_that_makes_keys() {
    let Some(dir) = std::env::var_os("SUNDARA_TEST_KEY_DIR") else { return };
    for n in 0.. {
        create_hotkey(&Path::new(&dir).join(format!("hotkey-{n}"))).unwrap();
    }
}

#[test]
fn a_killed_creator_leaves_no_half_file() {
    let dir = dir();
    let mut found = 0;
    for round in 0..20 {
        let keys = dir.path().join(round.to_string());
        fs::create_dir(&keys).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "keys::tests::child_that_makes_keys"])
            .env("SUNDARA_TEST_KEY_DIR", &keys)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Killed at a different point each time: after its first, second, third ... file, whatever it is doing then.
        while names(&keys).len() <= round && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for path in names(&keys).iter().filter(|path| !path.to_string_lossy().contains(".new-")) {
            load_hotkey(path).unwrap();
            found += 1;
        }
    }
    assert!(found > 0, "the children made keys");
}
